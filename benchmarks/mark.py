"""Reports a run's first update to `benchmarks.startup`; imports only what the run has imported anyway."""

from __future__ import annotations

from accumexp.training.callbacks import Callback
from accumexp.training.trainer import Trainer

from .first_update import mark


class Mark(Callback):
    def update_end(self, trainer: Trainer) -> None:
        if trainer.progress.update == 1:
            mark()
