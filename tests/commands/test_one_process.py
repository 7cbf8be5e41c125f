"""A run has one folder and one process, and a process that was killed leaves no run RUNNING."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.command import environment, journal, records, run_command
from ..support.launched import until

SMALL = ("model=mlp", "device=cpu", "data.batch_size=512", "tracking.system_metrics=false")
UPDATES = 60


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "run.log" and not path.name.startswith("mlflow.db")
    }


def slow(folder: Path) -> list[str]:
    """Overrides of a run that takes half a minute while the file `slow` is there, and no time without."""
    (folder / "slow").touch()
    return [
        "+callbacks.slow._target_=tests.support.odd_parts.Slow",
        f"+callbacks.slow.mark={folder / 'slow'}",
        f"trainer.max_updates={UPDATES}",
        "trainer.epochs=1000",
    ]


@pytest.fixture
def living(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run in `tmp_path / "run"` that goes on for long and has saved a checkpoint."""
    line = [sys.executable, "-m", "accumexp.run", *SMALL, *slow(tmp_path), "hydra.run.dir=run"]
    with (tmp_path / "out").open("wb") as out:
        process = subprocess.Popen(line, cwd=tmp_path, env=environment(), stdout=out, stderr=out)
    try:
        until(lambda: any((tmp_path / "run" / "checkpoints").glob("update-*.pt")))
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_living_run_is_left_alone_and_a_killed_one_is_closed(
    tmp_path: Path, living: subprocess.Popen[bytes]
) -> None:
    for arguments, key in (
        (["resume=run", "trust=[tests]"], "resume"),
        ([*SMALL, "hydra.run.dir=run"], "hydra.run.dir"),
    ):
        error = run_command("run", *arguments, folder=tmp_path).error()
        assert error.startswith(f"{key}={tmp_path / 'run'}: ")
        if key == "resume":
            assert f"process {living.pid} works on this run" in error
    assert records(tmp_path)[0].status == "RUNNING"
    living.kill()
    living.wait()
    (tmp_path / "run" / "checkpoints" / ".update-00000001.pt.99.partial").touch()

    other = run_command("run", *SMALL, "trainer.max_updates=1", "hydra.run.dir=other", folder=tmp_path)
    assert other.code == 0, other
    dead, alive = records(tmp_path)
    assert (dead.status, alive.status) == ("KILLED", "FINISHED")
    last = max(row["update"] for row in journal(tmp_path / "run"))
    assert dead.tags["accumexp.error"] == f"killed after update {last}"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "KILLED"

    (tmp_path / "slow").unlink()
    resumed = run_command("run", "resume=run", "trust=[tests]", folder=tmp_path)
    assert resumed.code == 0, resumed
    assert [record.status for record in records(tmp_path)] == ["FINISHED", "FINISHED"]
    steps = [step for step, _ in records(tmp_path)[0].points["train/loss"]]
    assert steps == sorted(set(steps)) and steps[-1] == UPDATES
    assert not list((tmp_path / "run").rglob("*.partial"))


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    quick = (*SMALL, "tracking=none", "trainer.max_updates=1", "hydra.run.dir=run")
    assert run_command("run", *quick, folder=tmp_path).code == 0
    before = contents(tmp_path)
    for command in ("run", "prove"):
        assert "holds a run already" in run_command(command, *quick, "seed=5", folder=tmp_path).error()
        assert contents(tmp_path) == before


@pytest.mark.slow
def test_data_workers_that_outlive_a_killed_run_do_not_hold_it(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "accumexp.run", *SMALL, "tracking=none", "data.resident=false"]
    line += ["data.workers=1", *slow(tmp_path), "hydra.run.dir=run"]
    process = subprocess.Popen(line, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
    try:
        until(lambda: any((tmp_path / "run" / "checkpoints").glob("update-*.pt")))
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    begun = time.monotonic()
    (tmp_path / "slow").unlink()
    done = run_command("run", "resume=run", "trust=[tests]", folder=tmp_path)
    assert done.code == 0, done
    assert time.monotonic() - begun < 180
