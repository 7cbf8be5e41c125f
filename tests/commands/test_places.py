"""Places that cannot be written to, and addresses that no run is recorded at: one line, and what is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accumexp.training.checkpoint import find, load

from ..support.command import left_behind, only_run, records, run_command

SMALL = ("model=mlp", "device=cpu", "data.batch_size=512", "tracking.system_metrics=false")
LIMIT = "+callbacks.limit={_target_: tests.support.odd_parts.Limit, at: 4, size: 900000}"


def test_a_checkpoint_that_does_not_fit_ends_the_run_in_one_line(tmp_path: Path) -> None:
    done = run_command("run", *SMALL, "trainer.epochs=3", "tracking=none", LIMIT, folder=tmp_path)
    assert done.code == 1 and len(done.stderr.splitlines()) == 1, done
    run = only_run(tmp_path)
    path = run / "checkpoints" / "update-00000006.pt"
    assert done.stderr.startswith(f"error: checkpoint {path}: cannot be written: File too large; 1.1 MiB")
    whole = run / "checkpoints" / "update-00000003.pt"
    assert done.stderr.endswith(f"are free; the newest that is whole is {whole}\n")
    assert json.loads((run / "summary.json").read_text())["status"] == "FAILED"
    assert find(run) == whole and load(whole)["progress"]["update"] == 3
    assert not list(run.rglob("*.partial"))


def test_a_failed_write_is_recorded_as_the_error_of_the_run(tmp_path: Path) -> None:
    done = run_command("run", *SMALL, "trainer.epochs=1", LIMIT.replace("4", "1"), folder=tmp_path)
    assert done.code == 1, done
    (record,) = records(tmp_path)
    assert record.status == "FAILED" and "cannot be written" in record.tags["accumexp.error"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["tracking.uri=sqlite://"], "tracking.uri=sqlite://: names no file to keep runs in"),
        (["tracking.uri=sqlite:///"], "names no file to keep runs in"),
        (["tracking.uri='http://h/?token=abc'"], "tracking.uri=http://h/?token=...: a secret here"),
        (
            ["tracking.uri='postgresql://h/d?password=abc'"],
            "tracking.uri=postgresql+psycopg2://h/d?password=...",
        ),
        (["hydra.run.dir=/proc/x"], "hydra.run.dir=/proc/x: cannot be used: No such file or directory"),
        (["-m", "hydra.sweep.dir=/proc/x"], "hydra.sweep.dir=/proc/x: cannot be used"),
    ],
)
def test_a_place_for_no_run_is_one_line(tmp_path: Path, arguments: list[str], line: str) -> None:
    error = run_command("run", *arguments, *SMALL, folder=tmp_path).error()
    assert line in error and "abc" not in error
    assert left_behind(tmp_path) == []
