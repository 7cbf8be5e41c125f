"""`sweep.resume=`: a sweep that died is gone on with, and nothing of it is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from accumexp.errors import UsageError
from accumexp.run.arguments import command_lines
from accumexp.sweeps.job import SweepJob
from accumexp.sweeps.job_folders import (
    Launch,
    begin_launch,
    distinct_launches,
    has_jobs,
    job_folder_name,
    job_folders,
    launches,
)
from accumexp.sweeps.job_status import JobStatus, job_status
from accumexp.sweeps.sweep import SweepFolder, SweepRun, launched_sweep, sweep_runs
from accumexp.tracking.json_file import write_json
from accumexp.tracking.run_folder import RunFolder, RunStatus
from accumexp.training.checkpoint import find, load, save

from ..support.command import Record, environment, journal, only_sweep, records, run_command
from ..support.trouble import trouble
from ..unit.test_live import multirun
from .test_resume import STATEFUL

SMALL = ["model=mlp", "trainer.epochs=20", "tracking.system_metrics=false", "trainer.log_every=4"]
# Each ends after 4 of 20 epochs, of its own will.
STOPPING = ["callbacks=early_stopping", "callbacks.early_stopping.min_delta=1"]
STOPPING += ["callbacks.early_stopping.patience=3"]
PATIENCE = 120  # seconds for a worker on busy cores to import torch and train


# The launcher is killed ----------------------------------------------------------------------------------


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


# A job is killed, and the sweep is extended --------------------------------------------------------------


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


# Several launches in one folder --------------------------------------------------------------------------


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


# The command line ----------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "swept"
    folder.mkdir()
    (folder / "multirun.yaml").write_text(
        "hydra:\n  overrides:\n    task: [seed=0, 'name=${x}']\n    hydra: [hydra.mode=MULTIRUN, "
        "hydra/launcher=joblib, hydra.launcher.n_jobs=2, hydra.sweep.dir=elsewhere]\n"
    )
    return folder


def hydras(sweep: Path) -> list[str]:
    return [f"hydra.sweep.dir='{sweep}'"]


def only_line(*arguments: str) -> list[str]:
    (line,), changes = command_lines(arguments)
    assert not changes
    return line


def launched(sweep: Path, task: list[str], hydra: list[str], *jobs: str) -> int:
    """A launch, and the jobs that came to be of it."""
    launch = begin_launch(sweep, Launch("python -m accumexp.run", task, ["hydra.mode=MULTIRUN", *hydra]))
    for number, job in enumerate(jobs):
        job_folder_name(sweep, launch, number, job, [job])
    return launch


def test_the_bare_form_takes_the_sweeps_own_overrides(sweep: Path) -> None:
    overrides = ["seed=0", "name=${x}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert only_line("-m", f"sweep.resume={sweep}") == ["-m", *overrides, *hydras(sweep)]
    assert only_line("-m", f"sweep.resume={sweep}", "") == ["-m", *overrides, *hydras(sweep)]  # "$UNSET"


def test_what_the_bare_form_gives_hydra_anew_replaces_the_sweeps_own(sweep: Path) -> None:
    anew = ["-m", "hydra.launcher.n_jobs=4"]
    taken = ["seed=0", "name=${x}", "hydra/launcher=joblib"]
    assert only_line(*anew, f"sweep.resume={sweep}") == [*anew, *taken, *hydras(sweep)]
    anew = ["-m", "hydra/launcher=submitit_local"]
    assert only_line(*anew, f"sweep.resume={sweep}") == [*anew, *taken[:2], *hydras(sweep)]


def test_with_overrides_the_command_line_is_taken_as_it_is(sweep: Path) -> None:
    before = sorted(sweep.iterdir())
    given = ["--multirun", "seed=0,1"]
    assert only_line(f"sweep.resume={sweep}", *given) == [*given, *hydras(sweep)]
    assert sorted(sweep.iterdir()) == before


def test_the_bare_form_runs_what_is_missing_of_all_launches(sweep: Path) -> None:
    first, more = ["seed=0,1"], ["seed=7"]
    launched(sweep, first, ["hydra/launcher=joblib"], "seed=0")
    launched(sweep, more, [], "seed=7")
    launched(sweep, ["modl=x"], [])  # a bad command line, of which no job came to be
    launched(sweep, first, ["hydra/launcher=ray"], "seed=0")  # gone on with, in other words
    lines, _ = command_lines(["-m", f"sweep.resume={sweep}"])
    ray = ["-m", *first, "hydra/launcher=ray", *hydras(sweep)]
    assert lines == [ray, ["-m", *more, *hydras(sweep)]]
    launched(sweep, first, ["hydra/sweeper=optuna"], "seed=0")  # which makes other jobs of the same words
    assert len(distinct_launches(sweep)) == 3


def test_settings_of_the_report_make_no_other_jobs_and_reach_the_report(sweep: Path) -> None:
    overrides = ["seed=0", "name=${x}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    given = ["-m", f"sweep.resume={sweep}", "report.margin=2"]
    assert command_lines(given) == ([["-m", *overrides, *hydras(sweep)]], {"report.margin": "2"})
    assert command_lines([*given, "seed=1"]) == ([["-m", "seed=1", *hydras(sweep)]], {"report.margin": "2"})
    assert job_folder_name(sweep, 0, 0, "a", ["seed=0", "report.margin=1"]) == "0_a"
    assert job_folder_name(sweep, 1, 0, "a", ["seed=0"]) == "0_a"


def test_a_damaged_list_of_launches_is_one_clear_line(sweep: Path) -> None:
    for content in ('{"0": {"comm', "[]", '{"0": "python"}'):
        (sweep / "launches.json").write_text(content)
        with pytest.raises(UsageError, match="^.*/launches.json: is damaged; [^\n]*$"):
            command_lines(["-m", f"sweep.resume={sweep}"])
        with pytest.raises(UsageError, match="is damaged"):
            launched(sweep, [], [])
    assert not (sweep / "jobs.jsonl").exists()


def test_launches_that_begin_together_have_a_number_each(sweep: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda seed: launched(sweep, [f"seed={seed}"], []), range(16)))
    assert sorted(given) == list(range(16)) == sorted(launches(sweep))
    assert not has_jobs(sweep, 5)


def test_a_second_sweep_into_one_folder_is_a_launch_of_its_own(tmp_path: Path) -> None:
    folder = f"hydra.sweep.dir={tmp_path / 'new'}"
    configs = [multirun("seed=0,1", folder), multirun("seed=5", folder)]
    try:
        for config in configs:
            SweepFolder().on_multirun_start(config)
            first = config.hydra.overrides.task[0].partition(",")[0]
            job_folder_name(tmp_path / "new", int(config.hydra.callbacks.sweep.launch), 0, first, [first])
        assert launched_sweep.launches == (0, 1)
    finally:
        launched_sweep.reset()
    assert [one.folder for one in job_folders(tmp_path / "new")] == ["0_seed=0", "1_seed=5"]
    # From which launchers compose the configuration of their jobs.
    assert "hydra.callbacks.sweep.launch=1" in configs[1].hydra.overrides.hydra


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["sweep.resume={sweep}"], "sweep.resume={sweep}: goes on with a sweep, add -m"),
        (["-m", "sweep.resume={sweep}/0_a"], "sweep.resume={sweep}/0_a: no sweep there"),
        (["-m", "sweep.resume="], "sweep.resume=: no sweep there"),
        (["-m", "sweep.resume={sweep}", "resume=x"], "sweep.resume: .*leave out resume="),
        (["-m", "sweep.resume={sweep}", "sweep.resume=x"], "sweep.resume: .*one folder"),
        (["-m", "sweep.resume={sweep}", "report.margin=-1"], "^report.margin=-1.0: above 0"),
        (["-m", "sweep.resume={sweep}", "report={{margin: 2}}"], "one by one, such as report.margin=2$"),
    ],
)
def test_wrong_uses_are_named(arguments: list[str], complaint: str, sweep: Path) -> None:
    with pytest.raises(UsageError, match=complaint.format(sweep=sweep)):
        command_lines([argument.format(sweep=sweep) for argument in arguments])


# The jobs' folders ---------------------------------------------------------------------------------------


def test_a_job_keeps_its_folder_whatever_its_number_becomes(tmp_path: Path) -> None:
    for number, seed in enumerate("0123"):
        assert (
            job_folder_name(tmp_path, 0, number, f"seed={seed}", ["a=1", f"seed={seed}"])
            == f"{number}_seed={seed}"
        )
    assert job_folder_name(tmp_path, 0, 1, "seed=1", ["a=1", "seed=1"]) == "1_seed=1"  # asked again
    # A new seed first: every job behind it has another number now, and its overrides another order.
    given = [
        job_folder_name(tmp_path, 1, n, f"seed={s}", [f"seed={s}", "a=1"]) for n, s in enumerate("90123")
    ]
    assert given == ["4_seed=9", "0_seed=0", "1_seed=1", "2_seed=2", "3_seed=3"]


def test_another_job_never_gets_the_folder_of_one_with_the_same_number(tmp_path: Path) -> None:
    for number, seed in enumerate("01"):
        job_folder_name(tmp_path, 0, number, f"seed={seed}", [f"seed={seed}"])
    assert job_folder_name(tmp_path, 0, 0, "seed=7", ["seed=7"]) == "2_seed=7"
    assert job_folder_name(tmp_path, 0, 0, "seed=0", ["seed=0"]) == "0_seed=0"


def test_new_jobs_never_share_a_number_even_where_names_are_cut_alike(tmp_path: Path) -> None:
    for number in (0, 1):
        job_folder_name(tmp_path, 0, number, "long", [f"seed={number}"])
    given = [job_folder_name(tmp_path, 1, n, "long", [f"seed={n + 10}"]) for n in range(4)]
    assert given == ["2_long", "3_long", "4_long", "5_long"]


def test_jobs_that_a_sweeper_asks_for_twice_have_a_folder_each(tmp_path: Path) -> None:
    first = [job_folder_name(tmp_path, 0, n, "lr=1", ["lr=1"]) for n in (0, 1)]
    assert first == ["0_lr=1", "1_lr=1"]
    again = [job_folder_name(tmp_path, 1, n, "lr=1", ["lr=1"]) for n in (1, 0, 2)]
    assert again == [
        "1_lr=1",
        "0_lr=1",
        "2_lr=1",
    ]


def test_a_line_cut_short_by_a_kill_costs_that_job_alone_its_place(tmp_path: Path) -> None:
    job_folder_name(tmp_path, 0, 0, "a", ["a=0"])
    with (tmp_path / "jobs.jsonl").open("a") as file:
        file.write('{"launch": 0, "num')
    assert job_folder_name(tmp_path, 0, 1, "a", ["a=1"]) == "1_a"
    assert [one.folder for one in job_folders(tmp_path)] == ["0_a", "1_a"]


def test_a_sweep_without_a_list_of_places_is_known_by_its_summaries(tmp_path: Path) -> None:
    (tmp_path / "3_seed=1").mkdir()
    write_json(tmp_path / "3_seed=1" / "summary.json", {"overrides": ["seed=1"], "status": "FINISHED"})
    assert launched(tmp_path, [], []) == 1
    assert job_folder_name(tmp_path, 1, 0, "seed=1", ["seed=1"]) == "3_seed=1"


# How far a job has come ----------------------------------------------------------------------------------


def checkpoint(folder: Path, update: int) -> Path:
    path = folder / "checkpoints" / f"update-{update:08d}.pt"
    save(path, {"progress": {"update": update}})
    return path


def test_a_finished_job_gives_its_value_and_any_other_its_newest_readable_checkpoint(tmp_path: Path) -> None:
    assert job_status(RunFolder(tmp_path)) == JobStatus()
    write_json(tmp_path / "summary.json", {"status": "RUNNING", "monitored": None})
    assert job_status(RunFolder(tmp_path)) == JobStatus()
    older, newer = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    assert job_status(RunFolder(tmp_path)) == JobStatus(checkpoint=newer)
    newer.write_bytes(newer.read_bytes()[:-100])
    assert job_status(RunFolder(tmp_path)) == JobStatus(checkpoint=older)
    older.write_bytes(b"")
    assert job_status(RunFolder(tmp_path)) == JobStatus()
    write_json(tmp_path / "summary.json", {"status": "FINISHED", "monitored": 0.5})
    assert job_status(RunFolder(tmp_path)) == JobStatus(True, 0.5)


def test_a_job_that_starts_anew_finds_nothing_of_the_old_one(tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    kept = {"run.log", "config.yaml"}
    for name in (*kept, "summary.json", "metrics.jsonl", "progress.json"):
        (tmp_path / name).write_text("{}")
    RunFolder(tmp_path).clear()
    assert {path.name for path in tmp_path.iterdir()} == kept


HOLDER = """
import sys, time, pathlib
from accumexp.tracking.run_folder import RunFolder, RunStatus
with RunFolder(pathlib.Path(sys.argv[1])).hold(""):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_job_waits_for_another_process_that_still_runs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HOLDER,
            str(tmp_path),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    entered = threading.Event()

    def wait() -> None:
        with RunFolder(tmp_path).hold("job 3 seed=0"):
            entered.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not entered.wait(0.5)
    holder.kill()  # the system gives the lock back
    holder.wait()
    holder.stdout.close()
    waiting.join(10)
    assert entered.is_set()
    assert capsys.readouterr().out == "job 3 seed=0: still runs in another process, waiting for it\n"


# The parent ----------------------------------------------------------------------------------------------


class Opened:
    """A store that notes what is opened again."""

    def __init__(self) -> None:
        self.runs: list[tuple[str, str]] = []

    def open_again(self, run_id: str, command: str) -> None:
        self.runs.append((run_id, command))


def test_the_first_job_of_a_later_launch_opens_the_parent_again(tmp_path: Path) -> None:
    for command in ("", "", "python -m accumexp.run again"):
        begin_launch(tmp_path, Launch(command, [], []))
    write_json(tmp_path / "sweep.json", {"run_id": "p", "experiment_id": "1", "uri": "u", "launch": 0})
    store: Any = Opened()
    for launch in (0, 2, 2):
        job = SweepJob(0, "a", tmp_path, [], "", None, launch=launch)
        assert job.parent(store) == "p"
    assert store.runs == [("p", "python -m accumexp.run again")]
    assert json.loads((tmp_path / "sweep.json").read_text())["launch"] == 2
