"""Ctrl-C and SIGTERM: the first requests the end of the loop, the second interrupts it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any, Protocol


def exit_code_of(number: int) -> int:
    """128 + the signal's number, the convention of shells: 130 and 143."""
    return 128 + number


class Stoppable(Protocol):
    """A trainer of one or several runs."""

    def stop(self, reason: str, code: int = 1) -> None: ...


class StopSignals:
    """While active, SIGINT and SIGTERM stop `trainer` after its update; the second time they interrupt.

    Outside the main thread, where handlers cannot be set, it does nothing.

    Args:
        deadline: seconds after which a signal ends a process whose main thread does not handle it, because it
            waits in a collective for a rank that is gone. None: never.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline
        self._handled = threading.Event()
        self._wakeup: tuple[int, int] | None = None  # the previous descriptor and the new one
        self.received: signal.Signals | None = None
        self.trainer: Stoppable | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
            if self.deadline is not None:
                self._watch(self.deadline)
        return self

    def _watch(self, deadline: float) -> None:
        """Reads signals in a thread, which sees them even while the main thread is blocked."""
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        self._wakeup = (signal.set_wakeup_fd(writes, warn_on_full_buffer=False), writes)

        def watch() -> None:
            while written := os.read(reads, 1):
                stops = written[0] in (signal.SIGINT, signal.SIGTERM)  # not SIGCHLD, for example
                if stops and not self._handled.wait(deadline):
                    os._exit(exit_code_of(written[0]))
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
        self._handled.set()
        again = self.received is not None
        self.received = signal.Signals(number)
        if again or self.trainer is None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(exit_code_of(number))
        self.trainer.stop(self.received.name, number)
