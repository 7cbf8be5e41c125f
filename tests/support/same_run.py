"""What two runs must share to be the same training: every bit of state, the journal, and MLflow's points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from accumexp.training.checkpoint import find, load

from .command import Record, journal

# All that has a state: dropout draws, moments, a schedule, averaged weights, the best value so far.
STATEFUL = [
    *("model=mlp", "model.dropout=0.3", "optimizer=adamw", "callbacks=ema", "callbacks.ema.decay=0.9"),
    *("scheduler=warmup_cosine", "scheduler.warmup_updates=7", "accum.steps=3", "trainer.epochs=3"),
    *("trainer.log_every=4", "tracking.system_metrics=false"),
]

# A measured time or amount of memory differs from run to run.
MEASURED = {"final/seconds", "final/samples_per_second", "final/update_ms", "final/peak_memory_mib"}


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two nested states differ in any bit."""
    if type(one) is not type(other):
        return [at]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [at]
    if isinstance(one, Mapping):
        if one.keys() != other.keys():
            return [f"{at}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [d for key in one for d in differences(one[key], other[key], f"{at}/{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [at]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for number, (a, b) in pairs for d in differences(a, b, f"{at}/{number}")]
    return [] if one == other else [at]


def state(run: Path) -> dict[str, Any]:
    """All that a run's newest checkpoint holds of the training, the random state included."""
    content = load(find(run))
    del content["config"], content["run"], content["progress"]["seconds"]
    content["callbacks"].pop("trouble", None)
    return content


def rows(run: Path) -> list[dict[str, Any]]:
    """The journal without times and speeds."""
    return [
        {key: value for key, value in row.items() if key != "time" and not key.startswith("perf/")}
        for row in journal(run)
    ]


def points(record: Record) -> dict[str, list[tuple[int, float]]]:
    """MLflow's points, but for what is measured."""
    return {
        key: values
        for key, values in record.points.items()
        if not key.startswith(("perf/", "system/")) and key not in MEASURED
    }


def doubled(record: Record) -> list[str]:
    """The keys of which MLflow has two points of one step."""
    return [key for key, values in record.points.items() if len(values) != len({step for step, _ in values})]
