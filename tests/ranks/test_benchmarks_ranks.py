"""`benchmarks.ranks` and `benchmarks.sharded` on two processes: their counts and reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..support.command import PACKAGE_PARENT

pytestmark = pytest.mark.slow


def report_of(benchmark: str, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The report and the output of one short run on two ranks, where every warning is an error."""
    path = folder / "report.json"
    sizes = ["--ranks=2", "--micro-batch=4", "--updates=1", "--repeats=2", "--device=cpu", *options]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"benchmarks.{benchmark}", *sizes, f"--json={path}"],
        cwd=PACKAGE_PARENT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def test_law_5_the_benchmark_counts_one_gradient_all_reduce_a_window(tmp_path: Path) -> None:
    report, stdout = report_of("ranks", tmp_path, "--steps=1,3")
    assert report["settings"]["micro_batch"] == 4
    assert report["environment"]["backend"] == "gloo"
    counts = {
        (row["loop"], row["steps"]): (row["gradient_all_reduces"], row["other_all_reduces"])
        for row in report["rows"]
    }
    assert counts == {
        ("hand-written", 1): (1, 0),
        ("hand-written", 3): (1, 0),
        ("no no_sync", 1): (1, 0),
        ("no no_sync", 3): (3, 0),
        ("accumexp", 1): (1, 1),  # the other is the window's weight
        ("accumexp", 3): (1, 1),
    }
    by_hand, every_time, ours = (row for row in report["rows"] if row["steps"] == 3)
    assert every_time["bytes"] == 3 * by_hand["bytes"]
    assert ours["bytes"] == by_hand["bytes"] + 8  # one float64
    for row in report["rows"]:
        assert row["gradient_error"] <= 1e-5
        assert len(row["ms"]) == 2 and min(row["ms"]) > 0
    for heading in ("loop", "ratio", "environment: torch"):
        assert heading in stdout


@pytest.mark.slow
def test_a_sharded_module_is_reduced_once_a_window_or_once_a_micro_batch(tmp_path: Path) -> None:
    report, stdout = report_of("sharded", tmp_path, "--steps=1,3", "--width=16")
    linears = 3
    rows = {(row["loop"], row["steps"]): row for row in report["rows"]}
    assert {key: (row["reduce_scatters"], row["all_reduces"]) for key, row in rows.items()} == {
        ("once a window", 1): (linears, 1),  # the all-reduce is the window's weight
        ("once a window", 3): (linears, 1),
        ("every micro-batch", 1): (linears, 1),
        ("every micro-batch", 3): (3 * linears, 1),
        ("DDP", 1): (0, 2),
        ("DDP", 3): (0, 2),
    }
    once, every, ddp = (rows[name, 3] for name in ("once a window", "every micro-batch", "DDP"))
    whole = 4 * (32 * 32 * 16 + 16 + 16 * 16 + 16 + 16 * 10 + 10)  # divides by two ranks without padding
    assert once["reduce_scatter_bytes"] == whole
    assert every["reduce_scatter_bytes"] == 3 * whole
    assert ddp["all_reduce_bytes"] == whole + 8
    assert once["gradient_bytes_between"] == ddp["gradient_bytes_between"] == whole
    assert every["gradient_bytes_between"] == whole / 2
    for row in (once, every):
        assert row["parameter_bytes_at_rest"] == whole / 2
        # Twice a micro-batch: its forward and its backward.
        assert row["all_gathers"] == 3 * 2 * linears and row["all_gather_bytes"] == 3 * 2 * whole
    for row in report["rows"]:
        assert row["gradient_error"] <= 1e-5
        assert len(row["ms"]) == 2 and min(row["ms"]) > 0
    for heading in ("loop", "gathered", "quartiles", "environment: torch"):
        assert heading in stdout
