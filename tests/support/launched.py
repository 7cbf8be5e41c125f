"""What tests of whole runs over several ranks share: options, weights, and who is alive."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from accumexp.training.checkpoint import find, load
from accumexp.training.shards import folder_of, load_model

SMALL = ["model=mlp", "device=cpu", "tracking.system_metrics=false", "trainer.log_every=4"]
EXACT = [*SMALL, "precision=fp64", "accum.steps=3", "trainer.epochs=2", "data.batch_size=101"]
STATEFUL = [*SMALL, "model.dropout=0.3", "optimizer=adamw", "scheduler=cosine", "accum.steps=2"]


def saved_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights in a run's newest checkpoint, whole."""
    path = find(run)
    content = load(path)
    parts = folder_of(path, content)
    if parts is None:
        return content["model"]
    from accumexp.config.overrides import with_overrides
    from accumexp.training.experiment import Experiment

    config = with_overrides(content["config"], ["accum.strategy=standalone", "accum.processes=1"])
    model = Experiment.build(config).model
    load_model(model, parts)
    return model.state_dict()


def ranks_alive() -> list[psutil.Process]:
    processes = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        launched = (process.info["environ"] or {}).get("ACCUMEXP_TEST") == str(os.getpid())
        if launched and process.status() != psutil.STATUS_ZOMBIE:
            processes.append(process)
    return processes


def until(condition: Any, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
