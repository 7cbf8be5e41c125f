"""`python -m accumexp.plan`: what it prints, keeps and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accumexp.plan.planner import Planner
from accumexp.plan.trial_run import trial_run

from ..support.command import only_run, run_command
from ..support.experiments import composed
from ..support.planned import LENET

pytestmark = pytest.mark.usefixtures("imports_are_kept_again")


def test_plan_prints_draws_and_keeps_the_frontier(tmp_path: Path) -> None:
    with trial_run(composed(*LENET, "data.batch_size=24")) as trial:
        limit = round(1.005 * Planner(trial).predicted_peak(3))
    small = ["data.batch_size=24", "data.eval_batch_size=8", "tracking=none", "device=cpu"]
    done = run_command("plan", *small, f"accum.memory_limit={limit}", folder=tmp_path)
    assert done.code == 0 and not done.stderr, done
    run = only_run(tmp_path)
    kept = json.loads((run / "plan.json").read_text())
    assert kept["chosen"]["steps"] == 3 and kept["limit"]["bytes"] == limit
    assert [p["steps"] for p in kept["points"]] == [1, 2, 3, 4, 8, 16, 24]
    assert (run / "plan.png").read_bytes().startswith(b"\x89PNG") and str(run / "plan.png") in done.stdout
    lines = done.stdout.splitlines()
    (chosen,) = [line for line in lines if line.rstrip().endswith("chosen")]
    assert chosen.split()[:2] == ["8", "3"] and sum("does not fit" in line for line in lines) == 2
    assert "accum.steps=3: the largest micro-batch that fits, 8 samples" in lines
    assert not (tmp_path / "mlflow.db").exists()


def test_plan_refuses_in_one_line(tmp_path: Path) -> None:
    for arguments, message in (
        (["-m", "seed=0,1"], "--multirun: a plan is of one experiment, leave it out"),
        (["device=cpu", "accum.memory_limit=1KiB"], "accum.steps=auto: an update with one sample"),
        (["accum=fsdp", "device=cpu"], "accum=fsdp: a model in shards cannot be tried in one process"),
        (["accum.reduction=sum"], "accum.reduction=sum: an update that grows with the micro-batches"),
        (["trainer.graph=true"], "trainer.graph=true: a recorded window keeps memory"),
        (["replicas=5", "accum.steps=4"], "replicas=5: a plan is of one run, leave it out"),
    ):
        done = run_command("plan", *arguments, folder=tmp_path)
        assert done.error().startswith(message), done
    assert not list(tmp_path.glob("outputs/*/*"))
