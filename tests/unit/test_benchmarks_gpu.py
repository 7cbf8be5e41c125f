"""`benchmarks.gpu`: failing parts do not stop it, and every part but the tests runs on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import commands, updates
from benchmarks.gpu.session import Session

pytestmark = pytest.mark.slow

HELP = """
import sys
from benchmarks.gpu import __main__ as gpu
try:
    gpu.main(["--help"])
finally:
    assert not {"torch", "rich", "accumexp"} & sys.modules.keys()
"""


def test_help_says_what_is_needed_and_imports_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, cwd=gpu.ROOT)
    assert done.returncode == 0, done.stderr
    for word in (*gpu.PARTS, "torchmetrics", "pytest", "Not needed: mlflow"):
        assert word in done.stdout


def test_without_a_gpu_is_wrong_usage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as end:
        gpu.main([f"--out={tmp_path / 'gpu'}"])
    assert end.value.code == 2 and not (tmp_path / "gpu").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no GPU")


def test_parts_share_the_time_that_is_left() -> None:
    names = list(gpu.PARTS)
    left = 480.0
    for number, name in enumerate(names, 1):
        limit = gpu.limit_of(name, names[number:], left)
        assert limit > 25
        left -= limit
    assert left == pytest.approx(0)
    assert gpu.limit_of("tests", [], 480) == 480


PART = """
import json, subprocess, sys, time
json.dump({"figures": {"a": 1}, "lines": ["one"], "problems": []}, open(sys.argv[-1] + "/part.json", "w"))
print("before")
"""


@pytest.mark.parametrize(
    ("rest", "status", "last"),
    [
        ("", "ok", None),
        ("sys.exit('it broke')", "failed", "it broke"),
        ("raise ValueError('wrong')", "failed", "ValueError: wrong"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "failed", "before"),
        # The process that it started is killed too.
        ("subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])", "timeout", "before"),
    ],
)
def test_records_how_a_part_ended_and_what_it_had_measured(
    tmp_path: Path, rest: str, status: str, last: str | None
) -> None:
    start = time.monotonic()
    command = [sys.executable, "-c", PART + rest]
    row = gpu.run_part("memory", command, tmp_path / "part.log", 5 if status == "timeout" else 60)
    assert time.monotonic() - start < 50
    assert (row["status"], row["figures"], row["lines"]) == (status, {"a": 1}, ["one"])
    assert row.get("last_lines", [None])[-1] == last


def test_goes_on_after_a_part_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[dict[str, Any]] = [
        {"status": "failed", "seconds": 1.0, "lines": ["first"], "last_lines": ["x", "why"]},
        {"status": "ok", "seconds": 2.0, "lines": ["second"]},
    ]
    kept: list[list[str]] = []

    def run_part(name: str, command: list[str], log: Path, limit: float) -> dict[str, Any]:
        path = tmp_path / "gpu.json"
        kept.append(list(json.loads(path.read_text())["parts"]) if path.exists() else [])
        return ended[len(kept) - 1]

    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(gpu, "probe", lambda device: {"device": "GPU 1", "torch": "2", "cuda": "13"})
    with pytest.raises(SystemExit) as end:
        gpu.main(["--part=memory", "--part=window", f"--out={tmp_path}"])
    assert end.value.code == 1 and kept == [[], ["memory"]]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["device"] == "GPU 1" and list(report["parts"]) == ["memory", "window"]
    shown = capsys.readouterr().out
    for word in ("GPU 1", "first", "why", "second"):
        assert word in shown


def test_window_and_memory_on_the_cpu(tmp_path: Path) -> None:
    session = Session("cpu", True, tmp_path)
    updates.window(session)
    updates.memory(session)
    assert not session.problems
    written = json.loads((tmp_path / "part.json").read_text())["figures"]
    (cell,) = [figures for figures in written.values() if "loops" in figures]
    names = [kind.name for kind in updates.KINDS]
    assert list(cell["loops"]) == names[:3] and "need a GPU" in cell["left_out"][names[3]]
    for row in cell["loops"].values():
        assert len(row["seconds"]) == cell["rounds"] and row["gradient_error"] < 1e-12
    assert written["lenet5, hand-written"]["ratio"] < 0.5


def test_counts_the_tests_as_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: a GPU\n")
    (tmp_path / "tests" / "test_one.py").write_text(
        "import pytest\n"
        "pytestmark = [pytest.mark.gpu]\n"
        "@pytest.mark.parametrize('x', ['a b', 'c'])\n"
        "def test_x(x): assert x == 'a b'\n"
        "@pytest.fixture\n"
        "def ends():\n"
        "    yield\n"
        "    raise ValueError('at the end')\n"
        "def test_y(ends): pass\n"
    )
    (tmp_path / "tests" / "test_two.py").write_text("raise AssertionError('has no such mark')\n")
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    session = Session("cuda", False, tmp_path)
    commands.tests(session)
    assert list(session.figures["outcomes"].values()) == ["PASSED", "FAILED", "ERROR"]
    assert session.lines[0] == "1 passed, 1 failed, 1 error"
    assert session.lines[1:] == ["failed: test_x[c]", "error: test_y"]
    assert session.problems == ["pytest ended with 1"]


@pytest.mark.slow
def test_runs_every_other_part_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--device=cpu", "--quick", "--minutes=20", f"--out={tmp_path}"])
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(parts) == [name for name in gpu.PARTS if name != "tests"]
    assert [row["status"] for row in parts.values()] == ["ok"] * 5
    replicas = parts["replicas"]["figures"]["replicas"]
    assert min(replicas[f"{name}_ratio"] for name in ("update", "training", "command")) > 0
    assert {"fp32", "bf16", "fp16"} <= parts["accuracy"]["figures"]["accuracy"].keys()
    assert {row["verdict"] for row in parts["certificates"]["figures"].values()} == {"proved"}
    assert "certificates" in capsys.readouterr().out
