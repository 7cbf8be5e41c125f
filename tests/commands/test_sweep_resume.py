"""`sweep.resume=`: a sweep that died is gone on with, and nothing of it is done twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from accumexp.sweeps.job_folders import job_folders
from accumexp.sweeps.sweep import SweepRun, sweep_runs
from accumexp.tracking.run_folder import RunFolder, RunStatus
from accumexp.training.checkpoint import find, load

from ..support.command import Record, environment, journal, only_sweep, records, run_command
from ..support.same_run import STATEFUL
from ..support.trouble import trouble

SMALL = ["model=mlp", "trainer.epochs=20", "tracking.system_metrics=false", "trainer.log_every=4"]
# Each ends after 4 of 20 epochs, of its own will.
STOPPING = ["callbacks=early_stopping", "callbacks.early_stopping.min_delta=1"]
STOPPING += ["callbacks.early_stopping.patience=3"]
PATIENCE = 120  # seconds for a worker on busy cores to import torch and train


# The launcher is killed --------------------------------------------------------------------------------


def ended(sweep: Path, status: str = "FINISHED") -> dict[str, SweepRun]:
    """The summaries of the jobs with this status, by folder."""
    return {job.folder.name: job for job in sweep_runs(sweep) if job.status == status}


@pytest.mark.slow
def test_after_a_kill_of_the_launcher_every_job_is_finished_once(tmp_path: Path) -> None:
    overrides = ["accum.steps=1,2,4", "seed=0,1", *SMALL, *STOPPING]
    line = ["run", "-m", *overrides, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", f"accumexp.{line[0]}", *line[1:]],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        give_up = time.monotonic() + PATIENCE
        while not (summaries := list(tmp_path.glob("multirun/*/*/*/summary.json"))) or len(summaries) < 3:
            assert launcher.poll() is None and time.monotonic() < give_up
            time.sleep(0.05)
        launcher.kill()  # alone: its workers live on, each in a job
        launcher.wait()
        sweep = only_sweep(tmp_path)
        before = ended(sweep)
        assert before and len(sweep_runs(sweep)) < 6
        # As if it had been killed after it had stopped and before it was evaluated on the test split.
        half, finished = next(iter(before.items()))
        RunFolder(sweep / half).write_summary(replace(finished, status=RunStatus.RUNNING, final={}))

        done = run_command("run", "-m", f"sweep.resume={sweep}", folder=tmp_path)
    finally:
        try:
            os.killpg(launcher.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    assert done.code == 0, done
    runs = records(tmp_path)
    parents = [record for record in runs if "mlflow.parentRunId" not in record.tags]
    children = [record for record in runs if record not in parents]
    assert [parent.status for parent in parents] == ["FINISHED"]
    assert parents[0].tags["accumexp.resumed"] == f"python -m accumexp.run -m sweep.resume={sweep}"
    assert {child.tags["mlflow.parentRunId"] for child in children} == {parents[0].run_id}
    assert not [child for child in children if child.status == "RUNNING"]
    assert once_each(children) == {(steps, seed) for steps in "124" for seed in "01"}

    after = ended(sweep)
    assert len(after) == 6 and len(list(sweep.glob("[0-9]*"))) == 6
    for folder, job in before.items():
        assert after[folder].run_id == job.run_id
        skipped = f"job {folder.replace('_', ' ', 1)}: finished before" in done.stdout
        assert skipped == (folder != half)
    for key in ("accuracy", "loss", "eval_accuracy", "updates"):
        assert after[half].final[key] == finished.final[key]
    assert {job.final["updates"] for job in after.values()} == {44}
    assert after[half].monitored == finished.monitored
    assert job_folders(sweep)[-1].launch == 1 and "n_jobs=2" in done.stdout  # its own launcher was taken


def once_each(children: list[Record]) -> set[tuple[str, str]]:
    """What the finished runs were, none of them twice."""
    finished = [(c.params["accum.steps"], c.params["seed"]) for c in children if c.status == "FINISHED"]
    assert len(finished) == len(set(finished)), finished
    return set(finished)


# A job is killed, and the sweep is extended ------------------------------------------------------------


def test_law_8_a_killed_job_goes_on_to_the_bits_of_its_undisturbed_twin(tmp_path: Path) -> None:
    stop = trouble("SIGKILL", 18, mark=tmp_path / "mark")
    overrides = [*STATEFUL, "callbacks.checkpoint.every_updates=5", stop, "seed=7"]
    # Two trainings that are alike but for their names, of which one is killed.
    first = run_command("run", "-m", "tracking.run_name=killed,twin", *overrides, folder=tmp_path)
    assert first.code == -signal.SIGKILL, first
    sweep = only_sweep(tmp_path)
    (between,) = sweep_runs(sweep)

    more = "tracking.run_name=new,killed,twin"
    second = run_command("run", "-m", more, *overrides, f"sweep.resume={sweep}", folder=tmp_path)
    assert second.code == 0, second
    jobs = {job.overrides[0].partition("=")[2]: job for job in sweep_runs(sweep)}
    assert [Path(jobs[name].folder).name[0] for name in ("killed", "new", "twin")] == ["0", "1", "2"]
    assert {job.status for job in jobs.values()} == {"FINISHED"}
    assert jobs["killed"].run_id == between.run_id
    killed, twin = Path(jobs["killed"].folder), Path(jobs["twin"].folder)
    states = [load(find(folder)) for folder in (killed, twin)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    assert jobs["killed"].monitored == jobs["twin"].monitored
    losses = [
        [(r["update"], r["train/loss"]) for r in journal(f) if "train/loss" in r] for f in (killed, twin)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 33
    runs = records(tmp_path)
    (resumed,) = [record for record in runs if record.run_id == between.run_id]
    assert resumed.status == "FINISHED" and resumed.tags["accumexp.resumed.15"] == "unchanged"
    assert len(runs) == 4 and {record.status for record in runs} == {"FINISHED"}


# Several launches in one folder ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bare_form_goes_through_all_that_the_launches_asked_for(tmp_path: Path) -> None:
    small = ["model=mlp", "trainer.max_updates=2", "trainer.epochs=1", "tracking=none"]

    def run(*arguments: str) -> str:
        done = run_command("run", "-m", *arguments, folder=tmp_path)
        assert done.code == 0, done
        return done.stdout

    run(*small, "seed=0", "hydra.sweep.dir=swept")
    run(*small, "seed=7,8", "sweep.resume=swept")
    run(*small, "seed=9", "hydra.sweep.dir=swept")  # said otherwise, and the same
    assert [job.launch for job in sweep_runs(tmp_path / "swept")] == [0, 1, 1, 2]
    jobs = [next((tmp_path / "swept").glob(f"{number}_*")) for number in range(4)]
    for job in jobs[:2]:
        RunFolder(job).clear()
    output = run("sweep.resume=swept", "report.margin=2")
    finished = ended(tmp_path / "swept")
    assert sorted(finished) == [job.name for job in jobs]
    assert [finished[job.name].launch for job in jobs] == [3, 4, 1, 2]
    assert output.count(": finished before") == 2 and output.count("sweep   ") == 1
