"""The launches of a sweep: what its folder keeps of them, and which of their jobs `sweep.resume=` runs."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

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
from accumexp.sweeps.sweep import SweepFolder, launched_sweep
from accumexp.tracking.json_file import write_json

from .test_live import multirun

# The command line --------------------------------------------------------------------------------------


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


def test_a_sweep_without_a_list_of_places_is_known_by_its_summaries(tmp_path: Path) -> None:
    (tmp_path / "3_seed=1").mkdir()
    write_json(tmp_path / "3_seed=1" / "summary.json", {"overrides": ["seed=1"], "status": "FINISHED"})
    assert launched(tmp_path, [], []) == 1
    assert job_folder_name(tmp_path, 1, 0, "seed=1", ["seed=1"]) == "3_seed=1"


# The parent --------------------------------------------------------------------------------------------


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
