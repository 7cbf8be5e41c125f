"""What ends a run: its length, early stopping, a loss that is not finite, a request."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from accumexp.errors import TrainingError
from accumexp.training.callbacks import Callback, EarlyStopping
from accumexp.training.progress import LoopOptions
from accumexp.training.trainer import Trainer

from ..support.experiments import trainer_of


@pytest.mark.parametrize("mode", ["max", "min"])
def test_early_stopping_waits_patience_evaluations(mode: str) -> None:
    class Scripted(Callback):
        def evaluated(self, trainer: Trainer, split: str, values: dict[str, float]) -> None:
            values["eval/accuracy"] = scores.pop(0) * (1 if mode == "max" else -1)

    scores = [0.1, 0.5, 0.4, 0.5, 0.3, 0.9]
    trainer, memory = trainer_of("trainer.epochs=6", "data.batch_size=2000")
    trainer.callbacks = {"scripted": Scripted(), "stop": EarlyStopping(patience=3, mode=mode)}
    trainer.fit()
    assert trainer.progress.epoch == 5 and scores == [0.9]
    assert "early stopping" in str(trainer.stop_reason)


def test_a_loss_that_is_not_finite_fails_the_run_unless_told_otherwise() -> None:
    trainer, _ = trainer_of("optimizer.lr=1e200", "trainer.epochs=1")
    with pytest.raises(TrainingError, match="train/loss is nan at update"):
        trainer.fit()
    trainer, memory = trainer_of("optimizer.lr=1e200", "trainer.epochs=1", "trainer.check_finite=false")
    trainer.fit()
    assert math.isnan(memory.series("train/loss")[-1][1])


@pytest.mark.parametrize(
    ("per_epoch", "epochs", "most", "expected"), [(10, 3, None, 30), (10, 3, 7, 7), (4, 2, 9, 8)]
)
def test_a_run_ends_at_whichever_comes_first(
    per_epoch: int, epochs: int, most: int | None, expected: int
) -> None:
    assert LoopOptions(epochs, most).total_updates(per_epoch) == expected


def test_a_request_to_stop_counts_only_where_the_options_allow_it_or_it_is_forced() -> None:
    trainer, _ = trainer_of("trainer.max_updates=6", "data.batch_size=500")
    trainer.options = replace(trainer.options, may_stop=False)
    trainer.callbacks.update(stopping=StopAt(2, force=False), forced=StopAt(4, force=True))
    trainer.fit()
    assert (trainer.progress.update, trainer.stop_reason) == (4, "stop at 4")


class StopAt(Callback):
    def __init__(self, update: int, force: bool) -> None:
        self.update, self.force = update, force

    def update_end(self, trainer: Trainer) -> None:
        if trainer.progress.update == self.update:
            trainer.stop(f"stop at {self.update}", force=self.force)
