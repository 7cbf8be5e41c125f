"""Ctrl-C and SIGTERM: the first asks the loop to end, the second does not ask."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from .trainer import Trainer


class StopSignals:
    """While active, SIGINT and SIGTERM stop `trainer` after its update; the second time they interrupt.

    Outside the main thread, where handlers cannot be set, it does nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.trainer: Trainer | None = None
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells say it: 130 and 143."""
        return 128 + (self.received or 0)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.received is not None
        self.received = signal.Signals(number)
        if again or self.trainer is None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(self.exit_code)
        self.trainer.stop(self.received.name, number)
