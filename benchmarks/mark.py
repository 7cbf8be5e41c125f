"""Tells `benchmarks.startup` of a run's first update. Imports nothing that the run has not imported."""

from __future__ import annotations

from accumexp.training.callbacks import Callback
from accumexp.training.trainer import Trainer

from .first_update import mark


class Mark(Callback):
    def update_end(self, trainer: Trainer) -> None:
        if trainer.progress.update == 1:
            mark()
