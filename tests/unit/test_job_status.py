"""How far a job of a sweep has come, and that one process at a time runs it."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from accumexp.sweeps.job_status import JobStatus, job_status
from accumexp.tracking.json_file import write_json
from accumexp.tracking.run_folder import RunFolder
from accumexp.training.checkpoint import save

from ..support.command import environment


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
