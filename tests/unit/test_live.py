"""The live view of a parallel sweep, drawn from folders and a clock, without a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console

from accumexp.conf import conf_dir
from accumexp.environment.console import OUTPUT, VIEWED, output_to_log
from accumexp.sweeps.hydra_sweep import count_jobs, runs_in_parallel
from accumexp.sweeps.job_folders import job_folder_name
from accumexp.sweeps.live_view import LiveView, ViewedSweep, render
from accumexp.tracking.json_file import write_json
from accumexp.tracking.metrics_file import ProgressFile

from ..support.command import environment

BEGAN = 1000.0


def watched(folder: Path, jobs: int | None = 6, launch: int = 0, mode: str = "max") -> ViewedSweep:
    return ViewedSweep(folder, launch, jobs, ["accum.steps", "seed"], "eval/accuracy", mode, BEGAN)


def begun(folder: Path, number: int, launch: int = 0) -> Path:
    """A job that has its folder, and no more."""
    overrides = ["accum.steps=4", f"seed={number}", "model=mlp"]
    job = folder / job_folder_name(folder, launch, number, f"accum.steps=4,seed={number}", overrides)
    job.mkdir(exist_ok=True)
    return job


def write_progress(job: Path, update: int, **values: float) -> None:
    named = {key.replace("_", "/", 1): value for key, value in values.items()}
    content = {"update": update, "total_updates": 400, "values": named, "time": time.time() + 0.01}
    write_json(job / "progress.json", content)


def over(job: Path, status: str = "FINISHED", monitored: float | None = 0.9, launch: int = 0) -> None:
    final = {"accuracy": 0.91, "loss": 0.25, "updates": 400.0, "seconds": 12.0}
    summary = {"status": status, "final": final, "monitored": monitored, "launch": launch, "error": "no luck"}
    write_json(job / "summary.json", summary)


def drawn(seen: ViewedSweep, now: float, height: int = 24, width: int = 110) -> list[str]:
    console = Console(record=True, width=width, file=open(os.devnull, "w"), force_terminal=True)
    console.print(render(seen, now, height))
    console.file.close()
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_view_names_running_jobs_totals_and_the_best(tmp_path: Path) -> None:
    seen = watched(tmp_path)
    jobs = [begun(tmp_path, number) for number in range(5)]
    over(jobs[0], monitored=0.9)
    over(jobs[1], "FAILED", None)
    write_progress(jobs[2], 100, train_loss=0.5, eval_accuracy=0.8, perf_update_ms=20.0)
    write_progress(jobs[3], 300, train_loss=0.25, eval_accuracy=0.95)
    assert [job.number for job in seen.read()] == [0, 1]
    lines = drawn(seen, BEGAN + 30)
    bar = "━" * 5 + "╺" + "━" * 14
    values = "100/400  loss 0.5000  eval/accuracy 0.8000  50.0 updates/s"
    assert lines[0] == f"2  accum.steps=4 seed=2  {bar}  {values}"
    assert "seed=3" in lines[1] and lines[1].endswith("300/400  loss 0.2500  eval/accuracy 0.9500")
    assert lines[2].split() == ["4", "accum.steps=4", "seed=4", "starting"]
    # 1 + 1 + 0.25 + 0.75 jobs in 30 s, and 3 of 6 to go.
    counts = "1 of 6 done, 1 failed, 3 running, 1 waiting"
    assert lines[3] == f"{counts}; 30.0 s elapsed, about 30.0 s left"
    assert lines[4] == "best eval/accuracy 0.9500 so far: job 3 accum.steps=4 seed=3"
    assert len(lines) == 5
    over(jobs[3], monitored=0.85)
    assert [job.number for job in seen.read()] == [3]
    assert drawn(seen, BEGAN + 30)[-1] == "best eval/accuracy 0.9000: job 0 accum.steps=4 seed=0"


def test_the_best_of_a_loss_is_the_smallest(tmp_path: Path) -> None:
    seen = watched(tmp_path, mode="min")
    for number, value in enumerate((float("nan"), 0.2, 0.5)):
        over(begun(tmp_path, number), monitored=value)
    seen.read()
    assert drawn(seen, BEGAN + 1)[-1] == "best eval/accuracy 0.2000: job 1 accum.steps=4 seed=1"


def test_a_thousand_jobs_fit_a_terminal_and_ended_ones_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = []
    for number in range(1000):
        folder = f"{number}_seed={number}"
        (tmp_path / folder).mkdir()
        overrides = [f"seed={number}"]
        entry = {"launch": 0, "number": number, "overrides": overrides, "folder": folder, "time": 0.0}
        entries.append(json.dumps(entry))
        if number < 900:
            over(tmp_path / folder)
        else:
            write_progress(tmp_path / folder, 10)
    (tmp_path / "jobs.jsonl").write_text("\n".join(entries) + "\n")
    seen = watched(tmp_path, jobs=2000)
    assert len(seen.read()) == 900
    lines = drawn(seen, BEGAN + 10, height=20)
    assert len(lines) <= 19
    assert "and 84 more are running" in lines
    assert any(line.startswith("900 of 2000 done, 0 failed, 100 running, 1000 waiting") for line in lines)
    looked: list[str] = []
    monkeypatch.setattr("accumexp.tracking.run_folder.read_json", lambda path: looked.append(path.name) or {})
    assert seen.read() == []
    assert looked.count("summary.json") == 100


def test_what_an_earlier_launch_left_is_not_taken_for_this_ones_end(tmp_path: Path) -> None:
    finished, failed, killed = (begun(tmp_path, number) for number in range(3))
    over(finished)
    over(failed, "FAILED")
    write_progress(killed, 300)
    over(killed, "KILLED")
    time.sleep(0.01)
    for number in range(3):
        begun(tmp_path, number, launch=1)
    seen = watched(tmp_path, jobs=4, launch=1)
    (before,) = seen.read()
    assert before.result_line() == "job 0 accum.steps=4,seed=0: finished before"
    lines = drawn(seen, BEGAN + 10)
    assert [line.split()[-1] for line in lines[:2]] == ["starting", "starting"]
    # Nothing is known yet of this launch's own pace.
    assert lines[2] == "1 of 4 done, 0 failed, 2 running, 1 waiting; 10.0 s elapsed"
    over(failed, "FAILED", launch=1)
    (ended,) = seen.read()
    assert ended.result_line() == "job 1 accum.steps=4,seed=1: no luck, see 1_accum.steps=4,seed=1/run.log"


def test_a_job_without_a_word_for_long_is_said_to_be_silent(tmp_path: Path) -> None:
    seen = watched(tmp_path)
    write_progress(begun(tmp_path, 0), 100, train_loss=0.5)
    seen.read()
    assert "silent" not in drawn(seen, time.time() + 10)[0]
    assert drawn(seen, time.time() + 45)[0].endswith("silent for 45.0 s")


def test_half_a_file_is_read_at_the_next_look(tmp_path: Path) -> None:
    seen, job = watched(tmp_path), begun(tmp_path, 0)
    (job / "summary.json").write_text('{"status": "FINI')
    assert seen.read() == [] and len(seen.running()) == 1
    over(job)
    assert [one.number for one in seen.read()] == [0]


def test_the_view_prints_a_line_for_every_job_that_ends(tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w") as file:
        console = Console(file=file, force_terminal=True, width=100, height=20)
        view = LiveView(watched(tmp_path), console)
        assert os.environ[VIEWED]
        over(begun(tmp_path, 0))
        begun(tmp_path, 1)
        time.sleep(0.8)
        over(begun(tmp_path, 2), "FAILED")
        view.stop()
    assert VIEWED not in os.environ
    screen = (tmp_path / "screen").read_text()
    result = "test accuracy 0.9100, test loss 0.2500, 400 updates in 12.0 s"
    assert screen.count(f"job 0 accum.steps=4,seed=0: {result}") == 1
    assert screen.count("job 2 accum.steps=4,seed=2: no luck") == 1
    assert "1 of 6 done, 0 failed, 1 running, 4 waiting" in screen


def test_viewed_jobs_and_their_children_write_to_a_file_of_their_own(tmp_path: Path) -> None:
    script = "import os\nfrom pathlib import Path\nimport sys\n"
    script += "from accumexp.environment.console import console, output_to_log\n"
    script += "with output_to_log(Path(sys.argv[1]), sys.argv[2] == '1'):\n"
    script += "    console.print('mine')\n    sys.stdout.flush()\n"
    script += "    os.system('echo a child')\n    print('wrong', file=sys.stderr)\n"
    script += "print('after')\n"
    for parallel_job in "10":
        line = [sys.executable, "-c", script, str(tmp_path), parallel_job]
        done = subprocess.run(
            line, env=environment(**{VIEWED: "1"}), capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines() == (
            ["after"] if parallel_job == "1" else ["mine", "a child", "after"]
        )
        assert done.stderr == ("" if parallel_job == "1" else "wrong\n")
    assert sorted((tmp_path / OUTPUT).read_text().splitlines()) == ["a child", "mine", "wrong"]


def test_nothing_is_redirected_without_a_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VIEWED, raising=False)
    with output_to_log(tmp_path, True):
        pass
    assert not (tmp_path / OUTPUT).exists()


def test_progress_is_written_once_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [BEGAN]
    monkeypatch.setattr("accumexp.tracking.metrics_file.time.time", lambda: clock[0])
    file = ProgressFile(tmp_path / "progress.json", 400)
    for update, seconds in ((1, 0.0), (2, 0.6), (3, 1.1)):
        clock[0] = BEGAN + seconds
        file.write(update, {f"v{update}": float(update)})
        written = json.loads((tmp_path / "progress.json").read_text())
        assert written["update"] == (1 if update < 3 else 3)
    assert written == {
        "update": 3,
        "total_updates": 400,
        "values": {"v1": 1.0, "v2": 2.0, "v3": 3.0},
        "time": BEGAN + 1.1,
    }


# What a sweep is, before it begins -----------------------------------------------------------------------


def multirun(*overrides: str) -> DictConfig:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        fixed = [override for override in overrides if "," not in override and "(" not in override]
        config = compose("config", fixed, return_hydra_config=True)
    config.hydra.overrides.task = [one for one in overrides if not one.startswith("hydra")]
    return config


@pytest.mark.parametrize(
    ("overrides", "jobs", "varied"),
    [
        (["accum.steps=1,2,4", "seed=range(5)", "model=mlp"], 15, ["accum.steps", "seed"]),
        (["model=mlp"], 1, []),
        (["experiment=equal_batch"], 20, ["accum.steps", "seed"]),
        (["experiment=equal_batch", "seed=1"], 4, ["accum.steps"]),
        (["+tracking.tags.x=choice(a,b)", "name=[1,2]"], 2, ["tracking.tags.x"]),
        (["seed=0,1", "hydra.sweeper._target_=some.OptunaSweeper"], None, []),
    ],
)
def test_jobs_are_counted_as_hydras_sweeper_makes_them(
    overrides: list[str], jobs: int | None, varied: list[str]
) -> None:
    taken = [one for one in overrides if not one.startswith("name")]
    config = multirun(*taken)
    task = [one for one in overrides if not one.startswith("hydra")]
    assert count_jobs(config.hydra.sweeper, task) == (jobs, varied)


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ({"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}, False),
        ({"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"}, True),
        ({"_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"}, True),
        ({"_target_": "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"}, True),
    ],
)
def test_every_launcher_but_hydras_own_is_a_parallel_one(launcher: dict[str, Any], expected: bool) -> None:
    assert runs_in_parallel(launcher) is expected
