"""What happens to one of many seeds trained as one happens to no other: overflow, failure, early stop."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import Tensor

from accumexp.training.callbacks import Callback
from accumexp.training.replica_trainer import ReplicaTrainer
from accumexp.training.trainer import Trainer

from ..support.replicas import MLP, SMALL, both, built, same


def damage(seed: int, update: int) -> Any:
    """Makes one sample of one update of one replica infinite."""

    def act(replica_seed: int, trainer: Trainer) -> None:
        if replica_seed == seed and trainer.progress.update == update:
            assert trainer.batch is not None
            assert isinstance(trainer.batch.inputs, Tensor)
            trainer.batch.inputs[5] = math.inf

    return act


def test_an_overflow_of_one_replica_skips_its_update_and_no_other() -> None:
    scaled = ["accum=loss_scaled", "accum.steps=3", "trainer.log_every=1"]
    alone, together, errors = both(*scaled, act=damage(4, 6))
    assert errors == [None] * 3
    skipped = [dict(memory.series("accum/skipped_windows"))[15] for _, memory, _ in together]
    assert skipped == [0, 1, 0]
    for one, other in zip(alone, together, strict=True):
        scales = [memory.series("accum/loss_scale") for _, memory, _ in (one, other)]
        assert scales[0] == scales[1]
    same(alone, together)


def test_a_replica_whose_loss_is_not_finite_fails_and_the_others_go_on() -> None:
    alone, together, errors = both("trainer.log_every=2", act=damage(3, 6))
    assert errors[1:] == [None, None] and "train/loss is" in str(errors[0])
    assert [trainer.progress.update for trainer, _, _ in together] == [8, 15, 15]
    same(alone[1:], together[1:])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_replica_that_stops_early_leaves_and_the_others_go_on(optimizer: str) -> None:
    def act(seed: int, trainer: Trainer) -> None:
        if trainer.progress.update == {3: 9, 4: 4}.get(seed):
            trainer.stop("enough")

    alone, together, _ = both(f"optimizer={optimizer}", "accum.steps=2", act=act)
    assert [trainer.progress.update for trainer, _, _ in together] == [10, 5, 15]
    same(alone, together)
    storages = {trainer.model.get_parameter("layers.1.weight").data_ptr() for trainer, _, _ in together}
    assert len(storages) == 3


def test_a_learning_rate_that_one_replica_alone_has_is_used_for_it_alone() -> None:
    def act(seed: int, trainer: Trainer) -> None:
        if seed == 4 and trainer.progress.update == 6:
            trainer.scheduler.base_lrs = [0.003]

    alone, together, _ = both("optimizer=adam", "trainer.clip_norm=0.5", act=act)
    same(alone, together)
    assert [trainer.optimizer.param_groups[0]["lr"] for trainer, _, _ in together][1] == 0.003


def test_the_time_of_others_evaluations_is_nobodys_time() -> None:
    import time

    class Slow(Callback):
        def evaluated(self, trainer: Trainer, split: str, values: dict[str, float]) -> None:
            time.sleep(0.3)

    together = built([*MLP, *SMALL, "trainer.epochs=1"], True)
    for trainer, _, _ in together:
        trainer.callbacks["slow"] = Slow()
    ReplicaTrainer([trainer for trainer, _, _ in together]).fit(lambda trainer, error: time.sleep(0.3))
    assert max(trainer.progress.seconds for trainer, _, _ in together) < 0.3
