"""The thread that sends a run's record to its store, so that training never waits for it."""

from __future__ import annotations

import logging
import threading
import time

from ..errors import first_line
from .delivery import SLOWEST_UPLOAD, Delivery
from .outbox import Entry, Outbox
from .run_folder import UNSENT

log = logging.getLogger(__name__)
# Seconds from the end of a failed call to the next one; doubled by each failure in a row.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
MAX_ENTRIES = 1000
THREAD = "accumexp-tracking"
# Seconds without progress after which the end of a run waits no longer: for a server, for a database that
# other processes also write to, and when the wait itself was interrupted by a signal.
SERVER_PATIENCE, DATABASE_PATIENCE, INTERRUPTED_PATIENCE = 6.0, 60.0, 1.0


class Sender:
    """Sends an outbox's entries in order, in a thread; they wait there while the store does not answer.

    Args:
        outbox: whose entries are sent.
        delivery: sends them.
        flush_points: points that are sent at once when so many wait.
        flush_seconds: the longest that a point waits.
    """

    def __init__(self, outbox: Outbox, delivery: Delivery, flush_points: int, flush_seconds: float) -> None:
        self.outbox = outbox
        self.delivery = delivery
        self._flush_points = flush_points
        self._flush_seconds = min(flush_seconds, threading.TIMEOUT_MAX)
        self._points = 0  # added since the last look
        self._starting = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._last_progress = 0.0
        self._failure: str | None = None  # while the store does not answer, why

    def add(self, entry: Entry) -> None:
        """Adds an entry, which is sent some time."""
        self.outbox.add(entry)
        self._points += len(entry.get("points", ()))
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name=THREAD)
                self._thread.start()
        if self._points >= self._flush_points or not self._flush_seconds:
            self._wake.set()

    def flush(self) -> None:
        """Puts what was added on disk, and has it sent now."""
        self.outbox.flush()
        self._wake.set()

    def close(self) -> list[Entry]:
        """Sends the rest. Returns what is not sent, because the store makes no progress; the file has it."""
        patience = SERVER_PATIENCE if self.delivery.store.on_server else DATABASE_PATIENCE
        if self._closing.is_set():
            patience = INTERRUPTED_PATIENCE
        self.outbox.flush()
        self._last_progress = time.monotonic()
        self._closing.set()
        self._wake.set()
        while self._thread is not None and not self._done.wait(0.05):
            upload = self.delivery.uploading / SLOWEST_UPLOAD
            if time.monotonic() - self._last_progress > patience + upload:
                break
        self._given_up.set()
        unsent = [*self.delivery.failed, *self.outbox.take()[0]]
        self.outbox.close(unsent)
        return unsent

    @property
    def reason(self) -> str:
        """Why something is not sent."""
        return self._failure or reason_of(self.delivery.error)

    def _run(self) -> None:
        pause = FIRST_PAUSE
        while not self._given_up.is_set():
            if self._failure is None:
                self._wake.wait(self._flush_seconds or None)
            elif self._closing.is_set():
                self._given_up.wait(FIRST_PAUSE)
            else:
                self._closing.wait(pause)
            self._wake.clear()
            closing = self._closing.is_set()
            self._points = 0
            try:
                self._send_all(closing)
            except Exception as error:
                if self._given_up.is_set():
                    break  # without a line, and the outbox is closed
                pause = FIRST_PAUSE if self._failure is None else min(2 * pause, LONGEST_PAUSE)
                self._note_failure(error)
            else:
                if self._given_up.is_set():
                    break
                self._note_success()
                if closing:
                    break
        self._done.set()

    def _send_all(self, closing: bool) -> None:
        while not self._given_up.is_set():
            entries, ends = self.outbox.take(MAX_ENTRIES)
            if not entries:
                break
            self.delivery.send(entries, lambda count, ends=ends: self._progress(ends[count - 1]))
        if closing and self.delivery.failed:
            self.delivery.send_failed(self._note_progress)

    def _note_progress(self) -> None:
        self._last_progress = time.monotonic()

    def _progress(self, upto: int) -> None:
        self._note_progress()
        self.outbox.sent(upto, empties=not self.delivery.failed)

    def _note_failure(self, error: Exception) -> None:
        if self._failure is None:
            log.warning(
                "tracking: %s does not take the record (%s); training goes on, what is logged waits in %s",
                *(self.delivery.store.uri, reason_of(error), UNSENT),
            )
        self._failure = reason_of(error)

    def _note_success(self) -> None:
        if self._failure is not None:
            log.warning("tracking: %s takes the record again", self.delivery.store.uri)
        self._failure = None


def reason_of(error: BaseException | None) -> str:
    """The first cause of a store's error in one line, such as a refused connection; of None, "no answer"."""
    while cause := error and (error.__cause__ or error.__context__):
        error = cause
    return first_line(error)[:200] if error else "no answer"
