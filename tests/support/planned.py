"""Configurations to plan for, and the memory that their runs take.

It is read from the profiler's trace file, which is written by another way than the one that a prediction is
made from, and around a whole run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from accumexp.accum import held_bytes, tensors
from accumexp.config.schema import Config
from accumexp.data import ResidentBatches
from accumexp.environment.ranks import RankInfo
from accumexp.training.experiment import Experiment
from accumexp.training.metrics_sink import MemoryMetricsSink

AUTO = ["device=cpu", "accum.steps=auto"]
LENET = [*AUTO, "data.batch_size=96", "data.eval_batch_size=8"]
RESNET = [*AUTO, "model=resnet18", "data.image_size=8", "data.batch_size=24", "data.eval_batch_size=4"]


def taken_by(config: Config, path: Path, rank: RankInfo | None = None, updates: int = 2) -> int:
    """The most bytes of tensors that were alive in a run of `config`: of `updates` and their evaluation."""
    config.trainer.max_updates = config.trainer.log_every = updates
    config.callbacks.clear()
    experiment = Experiment.build(config) if rank is None else Experiment.build(config, rank)
    splits = experiment.splits
    every = [splits.train, splits.eval, splits.test]
    data = [
        t for b in every if isinstance(b, ResidentBatches) for t in tensors((b.inputs, b.targets, b.indices))
    ]
    held = held_bytes([*experiment.model.parameters(), *experiment.model.buffers(), *data])
    return held + allocated(lambda: experiment.trainer(MemoryMetricsSink()).fit(), path)


def allocated(work: Callable[[], Any], path: Path) -> int:
    """The most bytes that were allocated at once during `work` and were not there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event["args"]["Ev Idx"]):
        alive += event["args"]["Bytes"]
        most = max(most, alive)
    return most
