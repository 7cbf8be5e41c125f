"""Callbacks of a trial run."""

from __future__ import annotations

import time

from ..environment.device import wait_for
from ..training.callbacks import Callback
from ..training.trainer import Trainer


class StopAfter(Callback):
    """Stops after `updates`, before anything is evaluated."""

    order = 1

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def update_end(self, trainer: Trainer) -> None:
        if trainer.progress.update >= self.updates:
            trainer.stop("trial ended")


class UpdateClock(StopAfter):
    """Measures the seconds of every update, without the gathering of its batch."""

    def __init__(self, updates: int) -> None:
        super().__init__(updates)
        self.seconds: list[float] = []
        self._start = 0.0

    def update_begin(self, trainer: Trainer) -> None:
        wait_for(trainer.device)
        self._start = time.perf_counter()

    def update_end(self, trainer: Trainer) -> None:
        wait_for(trainer.device)
        self.seconds.append(time.perf_counter() - self._start)
        super().update_end(trainer)
