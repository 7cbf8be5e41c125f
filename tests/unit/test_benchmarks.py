"""The benchmarks at their smallest sizes: their reports, and that a loop with another gradient is refused."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import growth, memory, startup, sweep, window, window_norm
from benchmarks.accumexp_loop import Accumexp
from benchmarks.cell import checked, measured_together, one_micro_batch, planned
from benchmarks.loops import HandWritten, SingleBatch
from benchmarks.measure import ratio_of
from benchmarks.pictures import growth_picture
from benchmarks.prediction import predicted
from benchmarks.tasks import MASKED, Samples, Task

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FIGURES = {
    "median_ms",
    "min_ms",
    "ratio",
    "ratio_low",
    "ratio_high",
    "saved_mib",
    "gradient_error",
    "seconds",
}


def report_of(main: Callable[[list[str]], None], folder: Path, *options: str) -> dict[str, Any]:
    path = folder / "report.json"
    main([*options, f"--json={path}"])
    report = json.loads(path.read_text())
    assert {"torch", "python", "device", "cores", "load"} <= report["environment"].keys()
    return report


def test_window_norm_is_exact_in_the_memory_of_a_micro_batch(tmp_path: Path) -> None:
    options = ["--batch=12", "--steps=3", "--image=64", "--rounds=1", "--device=cpu"]
    rows = {row["loop"]: row for row in report_of(window_norm.main, tmp_path, *options)["rows"]}
    exact = rows["norm=window"]
    assert exact["gradient_error"] < 1e-10 and exact["running_error"] < 1e-12
    assert exact["peak_ratio"] < 1.3 and exact["seconds"] > 0
    assert rows["micro-batches"]["gradient_error"] > 1e-3 and rows["micro-batches"]["ratio"] == 1


@pytest.mark.slow
def test_window_measures_every_contender_in_every_cell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = {"accelerate": "accelerate", "fabric": "lightning", "transformers": "transformers"}
    names = ["hand-written", "hand-written fused", "single-batch", "dataloader", *peers, "accumexp"]
    options = ["--micro-batch=4", "--steps=1,3", "--seconds=0.01", "--rounds=2", "--device=cpu"]
    options += [f"--only={','.join(names)}", f"--picture={tmp_path / 'window.png'}"]
    report = report_of(window.main, tmp_path, *options)
    there = [name for name in names if name not in peers or find_spec(peers[name])]
    assert [(cell["micro_batch"], cell["steps"]) for cell in report["cells"]] == [(4, 1), (4, 3)]
    for cell in report["cells"]:
        assert list(cell["loops"]) == there and not cell["refused"]
        assert sorted(cell["skipped"]) == sorted(set(names) - set(there))
        for row in cell["loops"].values():
            assert FIGURES <= row.keys() and row["gradient_error"] < 1e-12
            assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert cell["loops"]["hand-written"]["ratio"] == 1
        assert cell["misses"] == window.flags(cell)
    first, last = (cell["loops"]["accumexp"] for cell in report["cells"])
    assert first["saved_mib"] == pytest.approx(last["saved_mib"])  # of a micro-batch, whatever the steps
    assert {row["loop"] for row in report["growth"]} == {"hand-written", "accumexp"}
    assert (tmp_path / "window.png").stat().st_size
    assert "accum-" in capsys.readouterr().out


def test_window_says_which_cells_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--micro-batch=2", "--steps=1,1000000", "--seconds=0.01", "--rounds=1", "--only=hand-written"]
    report = report_of(window.main, tmp_path, *options, "--device=cpu")
    (cell,), (left,) = report["cells"], report["left_out"]
    assert (cell["steps"], left["steps"]) == (1, 1000000) and left["estimate_s"] > 5
    assert "lenet5, 1000000 x 2 left out" in capsys.readouterr().out


class NotDivided(HandWritten):
    """Adds micro-batch means without dividing by their number."""

    name = "not divided"

    def epoch(self) -> None:
        self.optimizer.zero_grad()
        for *inputs, targets in zip(*(t.chunk(self.task.steps) for t in self.tensors), strict=True):
            cross_entropy(self.model(*inputs), targets).backward()
        self.optimizer.step()


class LastWeighsMore(HandWritten):
    """Weighs the last micro-batch a millionth more than the others."""

    name = "last weighs more"

    def epoch(self) -> None:
        self.optimizer.zero_grad()
        for k, (*inputs, targets) in enumerate(zip(*(t.chunk(2) for t in self.tensors), strict=True)):
            ((1 + 1e-6 * k) * cross_entropy(self.model(*inputs), targets) / 2).backward()
        self.optimizer.step()


def test_another_gradient_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in (NotDivided, LastWeighsMore):
        monkeypatch.setitem(window.LOOPS, kind.name, kind)
    options = ["--micro-batch=4", "--steps=2", "--seconds=0.01", "--rounds=1", "--device=cpu"]
    with pytest.raises(SystemExit, match="a loop was refused"):
        report_of(window.main, tmp_path, *options, "--only=not divided,last weighs more,single-batch")
    (cell,) = json.loads((tmp_path / "report.json").read_text())["cells"]
    assert list(cell["loops"]) == ["hand-written", "single-batch"]
    assert list(cell["refused"]) == ["not divided", "last weighs more"]
    assert "off by 1.0e+00 of its norm" in cell["refused"]["not divided"]
    assert "refused not divided" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["resnet18", "bert"])
def test_the_gradients_of_other_models_are_equal_too(model: str) -> None:
    if model == "bert":
        pytest.importorskip("transformers")
        *_, targets = Samples("bert", 3000).tensors
        assert set((targets != -100).sum(1).tolist()) == {MASKED}
    errors, left_out, refused = checked([HandWritten, SingleBatch, Accumexp], Task(model, CPU, 2, 2, 4))
    assert max(errors.values()) < 1e-12 and len(errors) == 3
    assert not left_out and not refused


def test_a_cell_is_timed_in_many_short_rounds() -> None:
    task = Task("lenet5", CPU, 32, 4, 128)
    short = planned(task, update=0.015, seconds=10)
    assert (short.rounds, short.epochs, short.updates) == (133, 1, 5)
    long = planned(task, update=4.0, seconds=10)
    assert (long.epochs, long.updates) == (1, 1) and long.rounds == 5
    given = planned(task, update=0.01, seconds=10, rounds=15, updates=220)
    assert (given.rounds, given.epochs, given.updates) == (15, 20, 11)


def test_times_of_different_windows_are_compared_round_by_round() -> None:
    tasks = [Task("mlp", CPU, 4, steps, 4 * steps, width=4) for steps in (1, 8)]
    one = one_micro_batch(tasks[0])
    first, last = measured_together([HandWritten, Accumexp], [(task, one) for task in tasks], 0.05)
    for name in ("hand-written", "accumexp"):
        short, long = first["loops"][name], last["loops"][name]
        assert short["times"] == 1 and len(short["seconds"]) == len(long["seconds"]) == first["rounds"]
        ratios = [a / b for a, b in zip(long["seconds"], short["seconds"], strict=True)]
        each = first["updates"] / last["updates"]
        assert long["times"] == pytest.approx(each * statistics.median(ratios)) and long["times"] > 1


def test_the_conclusion_names_only_measured_peers() -> None:
    rows = {"hand-written": {"ratio": 1.0}, "accumexp": {"ratio": 1.01}}
    cell: dict[str, Any] = {"loops": rows, "misses": []}
    report = {"cells": [cell], "left_out": []}
    assert window.conclude(report).endswith("at most 1.02 in 1 of 1 cells")
    rows["fabric"] = {"ratio": 1.1}
    assert window.conclude(report).endswith("at most 1.02 in 1 of 1 cells, ahead of fabric in 1")


def test_a_sweep_of_uneven_steps_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.arguments(["--steps=1,3"])
    assert "--steps: 3 do not divide the 128 samples" in capsys.readouterr().err


@pytest.mark.parametrize("panel", ["ranks", "points"])
def test_growth_draws_only_the_measured_panels(panel: str, tmp_path: Path) -> None:
    rows = {
        "ranks": [{"ranks": n, "loop": "accumexp", "median_ms": 1.0 * n} for n in (1, 2)],
        "points": [{"points": 10**n, "ms_a_point": 0.1} for n in (3, 4)],
    }
    growth_picture({panel: rows[panel]}, tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_a_ratio_includes_rare_rounds() -> None:
    seconds, reference = [1.0] * 9 + [2.0], [1.0] * 10
    assert ratio_of(seconds, reference)["ratio"] == 1
    assert ratio_of(seconds, reference, [0] * 9 + [1])["ratio"] == pytest.approx(1.1)


def test_memory_is_that_of_a_micro_batch(tmp_path: Path) -> None:
    options = ["--model=lenet5", "--batch=64", "--steps=8", "--only=hand-written", "--device=cpu"]
    report = report_of(memory.main, tmp_path, *options, "--threads=1", f"--picture={tmp_path / 'm.png'}")
    (row,) = report["rows"]
    parts = row["predicted_bytes"]
    parameters = sum(p.nbytes for p in Task("lenet5", CPU, 1, 1, 1).build().parameters())
    assert parts["parameters"] == parts["gradients"] == parts["optimizer"] == parameters
    assert parts["data"] == 64 * (4 * 32 * 32 + 8)
    assert parts["activations"] / 2**20 == pytest.approx(row["saved_mib"], rel=0.01)
    whole = predicted(Task("lenet5", CPU, 64, 1, 64))
    assert whole.activations == pytest.approx(8 * parts["activations"], rel=0.01)
    # What a backward needs for itself is beyond what is kept for it, but not beyond all as much again.
    assert row["predicted_mib"] < row["peak_mib"] < 2 * row["predicted_mib"]
    assert (tmp_path / "m.png").stat().st_size


@pytest.mark.slow
def test_sweep_times_whole_commands_and_reads_what_they_reached(tmp_path: Path) -> None:
    options = ["--steps=4", "--seeds=1", "--epochs=1", "--repeat=1", "--only=accumexp"]
    report = report_of(sweep.main, tmp_path, *options)
    row = report["commands"]["accumexp"]
    assert report["settings"]["runs"] == 1 and len(row["accuracy"]["4"]) == 1
    assert len(row["seconds"]) == 1 and row["ratio"] == 1


def test_sweep_skips_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    options = sweep.arguments(["--only=accumexp,lightning", "--repeat=3"])
    report = sweep.report_of(options, timed=lambda name, command: (2.0, {"1": [0.5]}))
    assert list(report["skipped"]) == ["lightning"]
    assert report["commands"]["accumexp"]["seconds"] == [2.0] * 3


@pytest.mark.slow
def test_startup_times_first_updates_and_exits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = startup.CASES["first update: accumexp.run, tracking=none"]
    first, whole = startup.timed("ours", ours)
    assert 0 < first < whole
    name = "first update: hand-written"
    monkeypatch.setattr(startup, "CASES", {name: startup.CASES[name]})
    report = report_of(startup.main, tmp_path, "--repeat=1")
    (row,) = report["cases"].values()
    assert 0 < row["median_s"] < row["exit_s"] and row["ratio"] == 1
    with pytest.raises(SystemExit, match="x ended with 3"):
        startup.timed("x", startup.Case(("-c", "raise SystemExit(3)"), "import torch"))


@pytest.mark.slow
def test_growth_draws_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--only=steps,parameters,points",
        "--steps=1,2",
        "--widths=4",
        "--points=7,1003",
        "--device=cpu",
    ]
    options += ["--micro-batch=4", "--seconds=0.01", f"--picture={tmp_path / 'growth.png'}"]
    report = report_of(growth.main, tmp_path, *options)
    assert [(row["points"], row["kept"]) for row in report["points"]] == [(7, 7), (1003, 1003)]
    assert all(row["ms_a_point"] > 0 for row in report["points"])
    assert [row["steps"] for row in report["steps"]] == [1, 2]
    (row,) = report["parameters"]
    assert row["parameters"] == 1024 * 4 + 4 + 4 * 4 + 4 + 4 * 10 + 10
    assert "t(2) is" in capsys.readouterr().out and (tmp_path / "growth.png").stat().st_size
