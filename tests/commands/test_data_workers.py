"""The processes that read data end with the command that has started them, also inside of a sweep."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from accumexp.data import Placement, build_splits
from accumexp.environment.ranks import RankInfo
from accumexp.errors import UsageError
from accumexp.evaluate import evaluate
from accumexp.plan.trial_run import trial_run
from accumexp.prove.experiment import prove_experiment
from accumexp.run import run
from accumexp.training.callbacks import Callback

from ..support.experiments import composed

READ = ["model=mlp", "device=cpu", "data.resident=false", "data.workers=1", "trainer.max_updates=2"]
UNTRACKED = "tracking=none"


class Fail(Callback):
    """Refuses to go on after the first update, when a worker reads."""

    def update_end(self, trainer: Any) -> None:
        raise UsageError("callbacks.fail: no luck")


def readers() -> set[int]:
    """Those of this process's children that still run."""
    children = psutil.Process(os.getpid()).children()
    return {child.pid for child in children if child.status() != psutil.STATUS_ZOMBIE}


def trained(folder: Path) -> None:
    run([*READ, UNTRACKED], folder=folder)


def failed(folder: Path) -> None:
    with pytest.raises(UsageError, match="no luck"):
        fail = "+callbacks.fail._target_=tests.commands.test_data_workers.Fail"
        run([*READ, UNTRACKED, fail], folder=folder)


def evaluated(folder: Path) -> None:
    run([*READ, UNTRACKED, "data.workers=0"], folder=folder)
    evaluate(str(folder), "test", ["data.workers=1"], as_json=False)


def planned(folder: Path) -> None:
    with trial_run(composed(*READ, "accum.steps=1")) as trial:
        trial.whole(2)


def proved(folder: Path) -> None:
    prove_experiment(composed(*READ, "accum.steps=2", "data.batch_size=16"), RankInfo(), lambda stage: None)


def dropped(folder: Path) -> None:
    place = Placement(torch.device("cpu"), torch.float32)
    assert sum(len(batch.indices) for batch in build_splits(composed(*READ).data, 0, place).train.epoch(0))


@pytest.mark.parametrize("command", [dropped, trained, failed, evaluated, planned, proved])
def test_no_reader_is_left(command: Callable[[Path], None], tmp_path: Path) -> None:
    before = readers()
    command(tmp_path / "run")
    assert readers() <= before
