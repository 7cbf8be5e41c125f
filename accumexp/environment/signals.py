"""Ctrl-C and SIGTERM: the first asks the loop to end, the second does not ask."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Protocol


class Stoppable(Protocol):
    """What trains: a trainer, or many together."""

    def stop(self, reason: str, code: int = 1) -> None: ...


class StopSignals:
    """While active, SIGINT and SIGTERM stop `trainer` after its update; the second time they interrupt.

    Outside the main thread, where handlers cannot be set, it does nothing.

    Args:
        deadline: seconds after which a signal ends the process that does not get to hear it, because its
            main thread waits in a collective for a rank that is gone. None: never.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self._heard = threading.Event()
        self._wakeup: tuple[int, int] | None = None  # the descriptor before ours, and ours
        self.received: signal.Signals | None = None
        self.trainer: Stoppable | None = None
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells say it: 130 and 143."""
        return 128 + (self.received or 0)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
            if self.deadline is not None:
                self._watch(self.deadline)
        return self

    def _watch(self, deadline: float) -> None:
        """Reads signals where the interpreter writes them at once, even while the main thread is away."""
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        self._wakeup = (signal.set_wakeup_fd(writes, warn_on_full_buffer=False), writes)

        def watch() -> None:
            while written := os.read(reads, 1):
                stops = written[0] in (signal.SIGINT, signal.SIGTERM)  # and not a child that ended, say
                if stops and not self._heard.wait(deadline):
                    os._exit(128 + written[0])
            os.close(reads)

        threading.Thread(target=watch, daemon=True, name="stop-signals").start()

    def __exit__(self, *error: object) -> None:
        if self._wakeup is not None:
            before, writes = self._wakeup
            signal.set_wakeup_fd(before)
            os.close(writes)
            self._wakeup = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._heard.set()
        again = self.received is not None
        self.received = signal.Signals(number)
        if again or self.trainer is None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(self.exit_code)
        self.trainer.stop(self.received.name, number)
