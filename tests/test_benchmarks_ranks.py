"""What `benchmarks.ranks` counts: law 5 on two real processes, and the report that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .command import PACKAGE_PARENT


def test_law_5_the_benchmark_counts_one_gradient_all_reduce_a_window(tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    sizes = ["--ranks=2", "--steps=1,3", "--micro-batch=4", "--updates=1", "--repeats=2", "--device=cpu"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks.ranks", *sizes, f"--json={path}"],
        cwd=PACKAGE_PARENT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert report["settings"]["micro_batch"] == 4
    assert report["environment"]["backend"] == "gloo"
    found = {
        (row["contender"], row["steps"]): (row["gradient_all_reduces"], row["other_all_reduces"])
        for row in report["rows"]
    }
    assert found == {
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
    for heading in ("contender", "ratio", "environment: torch"):
        assert heading in done.stdout
