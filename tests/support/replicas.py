"""Runs of several seeds, each alone and all of them trained as one, and how far they are apart."""

from __future__ import annotations

from collections.abc import Callable as Function
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from accumexp.data import ResidentBatches
from accumexp.data.replica_batches import PlannedBatches
from accumexp.environment.ranks import RankInfo
from accumexp.errors import TrainingError
from accumexp.training.callbacks import Callback
from accumexp.training.components import placement
from accumexp.training.experiment import Experiment
from accumexp.training.metrics_sink import MemoryMetricsSink
from accumexp.training.replica_check import shared_splits
from accumexp.training.replica_trainer import ReplicaTrainer
from accumexp.training.trainer import Trainer
from accumexp.training.trainer_state import trainer_state

from .experiments import composed

SEEDS = (3, 4, 5)
MLP = ["model=mlp", "model.hidden=[12]"]
SMALL = [
    "data.image_size=8",
    "data.batch_size=300",
    "trainer.epochs=3",
]  # 5 updates an epoch, the last of 93 samples
EXACT = 1e-10


class Orders(Callback):
    """Keeps which samples each update saw, and lets a test act before an update's window."""

    def __init__(self, act: Function[[Trainer], None] = lambda trainer: None) -> None:
        self.seen: list[Tensor] = []
        self.act = act

    def update_begin(self, trainer: Trainer) -> None:
        assert trainer.batch is not None
        self.seen.append(trainer.batch.indices.clone())
        self.act(trainer)


Runs = list[tuple[Trainer, MemoryMetricsSink, Orders]]


def built(overrides: list[str], joint: bool, act: Any = None) -> Runs:
    """A trainer on digits for each of `SEEDS`, in fp64 unless told otherwise; `act(seed, trainer)`."""
    runs: Runs = []
    every = composed("device=cpu", "precision=fp64", "callbacks=none", *overrides)
    shared = shared_splits(every, placement(every, RankInfo()), "replicas") if joint else None
    for seed in SEEDS:
        config, memory, splits = replace(every, seed=seed), MemoryMetricsSink(), shared
        if splits:
            assert isinstance(splits.train, ResidentBatches)
            splits = replace(splits, train=PlannedBatches(splits.train, seed))
        trainer = Experiment.build(config, splits=splits).trainer(memory)
        orders = Orders((lambda t, seed=seed: act(seed, t)) if act else lambda t: None)
        trainer.callbacks["orders"] = orders
        runs.append((trainer, memory, orders))
    return runs


def both(
    *overrides: str, act: Any = None, model: list[str] = MLP
) -> tuple[Runs, Runs, list[Exception | None]]:
    """The runs alone, the same together, and the errors that those together ended with, by replica."""
    alone, together = ([*built([*model, *SMALL, *overrides], joint, act)] for joint in (False, True))
    for trainer, _, _ in alone:
        try:
            trainer.fit()
        except TrainingError:
            assert act
    ended: dict[Trainer, Exception | None] = {}
    ReplicaTrainer([trainer for trainer, _, _ in together]).fit(ended.__setitem__)
    return alone, together, [ended[trainer] for trainer, _, _ in together]


def far(one: Any, other: Any) -> float:
    """The largest relative distance of two equally nested states."""
    if isinstance(one, Tensor):
        one, other = one.double(), other.double()
        return float((one - other).norm() / one.norm().clamp(min=1e-300))
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((far(value, other[key]) for key, value in one.items()), default=0.0)
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        return max(map(far, one, other), default=0.0)
    assert one == other
    return 0.0


def same(alone: Runs, together: Runs, bound: float = EXACT) -> None:
    """Weights, optimizer, schedule, order of the data and every point but times and memory."""
    for (trainer, memory, orders), (other, others, order) in zip(alone, together, strict=True):
        assert len(orders.seen) == len(order.seen) == trainer.progress.update > 0
        assert all(map(torch.equal, orders.seen, order.seen))
        one, two = trainer_state(trainer), trainer_state(other)
        for key in ("model", "optimizer", "loss_scale", "scheduler"):
            assert far(one[key], two[key]) <= bound, key
        assert len(memory.rows) == len(others.rows)
        for (update, values, publish), row in zip(memory.rows, others.rows, strict=True):
            assert (update, publish) == (row[0], row[2]) and values.keys() == row[1].keys()
            for key, value in values.items():
                if not key.startswith("perf/"):
                    assert row[1][key] == pytest.approx(value, rel=bound, abs=1e-300, nan_ok=True), key
    assert not torch.equal(alone[0][2].seen[0], alone[1][2].seen[0])
