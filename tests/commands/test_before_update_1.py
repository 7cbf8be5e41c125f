"""Law 12: what would fail in the middle of a run is told in one line before its first update."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from accumexp.training.components import OWN_VALUES

from ..support.command import Case, Done, left_behind, run_command, run_many

SMALL = ("model=mlp", "device=cpu", "tracking=none", "data.batch_size=512", "trainer.epochs=1")
ODD = "tests.support.odd_parts"
F1 = "+metrics.f1._target_=torchmetrics.classification.MulticlassF1Score"
ONE_CYCLE = "scheduler._target_=torch.optim.lr_scheduler.OneCycleLR"

CASES = {
    "a metric of other classes": (
        [F1, "+metrics.f1.num_classes=4"],
        "metrics.f1 (torchmetrics.classification.MulticlassF1Score): fails on samples of data.train: ",
    ),
    "a metric named as a value of the run": (
        [
            "+metrics.loss._target_=torchmetrics.classification.MulticlassF1Score",
            "+metrics.loss.num_classes=10",
        ],
        "metrics.loss: the run records a value of its own as loss",
    ),
    "a loss that is not added up": ([f"loss._target_={ODD}.PerSample"], "loss: its value has shape ("),
    "a loss of other targets": (
        ["loss._target_=torch.nn.MSELoss"],
        "loss (torch.nn.MSELoss): fails on samples of data.train: RuntimeError: ",
    ),
    "a setting of the loss": (
        ["+loss.label_smoothing=2"],
        "loss (torch.nn.CrossEntropyLoss): fails on samples of data.train: RuntimeError: label_smoothing",
    ),
    "a schedule that fails": (
        ["scheduler=step", "scheduler.step_size=0"],
        "scheduler (torch.optim.lr_scheduler.StepLR): fails when it is stepped: ZeroDivisionError",
    ),
    "a schedule that ends": (
        [ONE_CYCLE, "+scheduler.max_lr=0.1", "+scheduler.total_steps=2"],
        "scheduler.total_steps=2: the run has 3 updates",
    ),
    "a fraction of a checkpoint": (
        ["callbacks.checkpoint.keep_last=1.5"],
        "callbacks.checkpoint.keep_last=1.5: a whole number",
    ),
    "a sampler without end": (
        [f"+data.sampler._target_={ODD}.EndlessSampler"],
        "data.sampler: yields more than ",
    ),
    "a sampler of less than a batch": (
        [f"+data.sampler._target_={ODD}.FewSampler", "data.drop_last=true"],
        "data.batch_size=512: with data.drop_last=true the 5 samples",
    ),
    "groups of one name": (
        ["+optimizer.groups=[{params: '*.bias', name: a}, {params: 'layers.1.*', name: a}]"],
        "optimizer.groups: a names two groups",
    ),
    "a rate that is a word": (
        ["+optimizer.groups=[{params: '*.bias', lr: fast}]"],
        "optimizer.groups: lr=fast is no number",
    ),
    "a number that is a word": (["optimizer.lr=fast"], "optimizer.lr=fast: a number is needed"),
    "a number that is true": (["optimizer.momentum=true"], "optimizer.momentum=True: a number is needed"),
    "a label that is a word": (["+loss.ignore_index=none"], "loss.ignore_index=none: a number is needed"),
    "a reduction that torch does not have": (
        ["+loss.reduction=median"],
        "loss.reduction=median: one of ",
    ),
    "a device without numbers": (["device=meta"], "device=meta: holds no numbers"),
    "a monitor of several values": (
        [F1, "+metrics.f1.num_classes=10", "+metrics.f1.average=null", "monitor=eval/f1"],
        "monitor=eval/f1: has several values, take one of eval/f1/0 to eval/f1/9",
    ),
    "a path in a callback's state": (
        [f"+callbacks.mine._target_={ODD}.Holds", "+callbacks.mine.kind=path"],
        "callbacks.mine: held in its state_dict is a PosixPath",
    ),
    "a function in a callback's state": (
        [f"+callbacks.mine._target_={ODD}.Holds", "+callbacks.mine.kind=function"],
        "callbacks.mine: held in its state_dict is a builtin_function_or_method",
    ),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Done, Path]]:
    base = tmp_path_factory.mktemp("refused")
    folders = {name: base / str(number) for number, name in enumerate(CASES)}
    cases = [Case("run", [*SMALL, *CASES[name][0]], str(folder)) for name, folder in folders.items()]
    done = run_many(cases, base / "scratch")
    return {name: (one, folders[name]) for name, one in zip(CASES, done, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_law_12_it_is_refused_by_name_and_leaves_nothing(
    name: str, refused: dict[str, tuple[Done, Path]]
) -> None:
    done, folder = refused[name]
    assert done.error().startswith(CASES[name][1])
    assert left_behind(folder) == []


WARNED = {
    "a rate that the schedule sets": (
        [ONE_CYCLE, "+scheduler.max_lr=0.1", "+scheduler.total_steps=3"],
        "optimizer.lr=0.05: has no effect with OneCycleLR",
    ),
    "the largest loss": (["monitor=eval/loss"], "monitor=eval/loss: with mode=max the largest is the best"),
    "a group's momentum": (
        ["+optimizer.groups=[{params: '*.bias', momentum: 1.5}]"],
        "optimizer.groups.0.momentum=1.5: usual is below 1",
    ),
}


def test_law_12_doubtful_settings_are_warned_of(tmp_path: Path) -> None:
    lines = [[*SMALL, *overrides] for overrides, _ in WARNED.values()]
    done = run_many(
        [Case("run", line, str(tmp_path / str(number))) for number, line in enumerate(lines)],
        tmp_path / "scratch",
    )
    for one, (_, line) in zip(done, WARNED.values(), strict=True):
        assert one.code == 0, one
        assert line in " ".join((one.stdout + one.stderr).split())


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("huge", "mine: a callback logs a number that is larger"),
        ("number", "3: a callback logs numbers by name"),
    ],
)
def test_law_12_what_no_tracker_takes_is_told_by_name(kind: str, line: str, tmp_path: Path) -> None:
    logs = [f"+callbacks.mine._target_={ODD}.Logs", f"+callbacks.mine.kind={kind}"]
    (done,) = run_many([Case("run", [*SMALL, *logs], str(tmp_path / "run"))], tmp_path / "scratch")
    assert done.code == 1 and len(done.stderr.splitlines()) == 1, done
    assert done.stderr.startswith(f"error: {line}")


def test_law_12_nothing_that_counts_has_no_score(tmp_path: Path) -> None:
    nothing = f"data.test._target_={ODD}.Nothing"
    done = run_command("run", *SMALL, nothing, "hydra.run.dir=run", folder=tmp_path)
    assert done.code == 0, done
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    assert math.isnan(final["loss"]) and math.isnan(final["accuracy"])
    assert "test/loss is nan" in " ".join((done.stdout + done.stderr).split())


def test_a_metric_of_each_class_is_recorded_class_by_class(tmp_path: Path) -> None:
    each = [F1, "+metrics.f1.num_classes=10", "+metrics.f1.average=null"]
    done = run_command("run", *SMALL, *each, "hydra.run.dir=run", folder=tmp_path)
    assert done.code == 0, done
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    assert [name for name in final if name.startswith("f1")] == [f"f1/{index}" for index in range(10)]
    metrics = {name for name in final if name.startswith(("f1/", "eval_"))} | {"accuracy"}
    assert final.keys() - metrics <= OWN_VALUES, "no metric may have the name of another value"
