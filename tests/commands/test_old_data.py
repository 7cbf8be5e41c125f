"""Checkpoints, run folders and sweeps of version 0.1.0, written before the modules moved into packages.

They were written by `python -m accumexp.run model=mlp "model.hidden=[4]" callbacks=ema accum.steps=4
trainer.max_updates=20 ...`, of which everything after update 15 was removed, and by a sweep over
`accum.steps=1,2`, of which the second job was removed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from accumexp.config.instantiate import with_present_targets
from accumexp.sweeps.sweep import sweep_runs

from ..support.command import journal, run_command

OLD = Path(__file__).resolve().parents[1] / "data" / "0.1.0"
# Losses of updates 16 to 20 of the run that was never stopped.
LOSSES = [1.7858376502990723, 1.6701651811599731, 1.6905741691589355, 1.4310740232467651, 1.5057413578033447]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


def test_an_old_checkpoint_is_evaluated(old: Path) -> None:
    checkpoint = old / "run" / "checkpoints" / "update-00000015.pt"
    done = run_command("evaluate", f"checkpoint={checkpoint}", folder=old)
    assert done.code == 0, done
    assert "accuracy" in done.stdout


def test_an_old_run_is_resumed_with_all_its_callbacks(old: Path) -> None:
    done = run_command("run", f"resume={old / 'run'}", folder=old)
    assert done.code == 0, done
    rows = [row for row in journal(old / "run") if "train/loss" in row]
    assert [row["update"] for row in rows] == list(range(1, 21))
    # Another machine may round otherwise.
    assert [row["train/loss"] for row in rows[15:]] == pytest.approx(LOSSES, rel=1e-4)


def test_an_old_sweep_is_resumed_and_reported(old: Path) -> None:
    done = run_command("run", "-m", f"sweep.resume={old / 'sweep'}", folder=old)
    assert done.code == 0, done
    assert "finished before" in done.stdout
    assert [run.status for run in sweep_runs(old / "sweep")] == ["FINISHED", "FINISHED"]
    done = run_command("report", f"sweep={old / 'sweep'}", folder=old)
    assert done.code == 0, done
    assert (old / "sweep" / "report" / "report.html").exists()


def test_targets_of_moved_modules_are_replaced_however_deep_they_lie() -> None:
    node = {"a": [{"_target_": "accumexp.optim.cosine", "b": {"_target_": "torch.nn.ReLU"}}]}
    assert with_present_targets(node) == {
        "a": [{"_target_": "accumexp.training.schedules.cosine", "b": {"_target_": "torch.nn.ReLU"}}]
    }
