"""Targets that are numbers: no classes, errors in the unit of the targets, and a margin that fits them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accumexp.accum.loss import WeightedSamples
from accumexp.errors import UsageError
from accumexp.plan.planner import Planner
from accumexp.plan.trial_run import trial_run
from accumexp.report.statistics import Verdict
from accumexp.report.wording import conclusion
from accumexp.training.class_checks import check_accuracy, check_class_loss
from accumexp.training.experiment import Experiment
from accumexp.training.metrics import Accuracy
from accumexp.training.preflight import try_example

from ..support.experiments import composed, trainer_of
from ..support.past_sweeps import job, reported, sweep

REGRESSION = (
    *(f"~data.{split}.{key}" for split in ("train", "test") for key in ("train", "image_size")),
    *(f"data.{split}._target_=tests.unit.test_regression.line" for split in ("train", "test")),
    *("data.num_classes=???", "model.inputs=3", "loss=mse", "metrics=regression", "data.batch_size=32"),
)


def line() -> TensorDataset:
    inputs = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs, inputs.sum(1, keepdim=True))


def test_a_regression_needs_no_classes_and_is_chosen_by_its_error() -> None:
    config = composed("model=mlp", *REGRESSION)
    assert config.data.num_classes is None and config.model["num_classes"] == 1
    assert (config.monitor, config.mode) == ("eval/mae", "min")
    trainer, _ = trainer_of(*REGRESSION, "accum.steps=4", "trainer.epochs=3")
    trainer.fit()
    errors = trainer.evaluate("test")
    assert 0 < errors["test/mae"] < errors["test/rmse"]
    assert errors["test/rmse"] ** 2 == pytest.approx(errors["test/loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("left", "says"),
    [
        (
            "loss=cross_entropy",
            r"^loss=CrossEntropyLoss: .* the targets \(n, 1\) of float32, .*loss=mse",
        ),
        ("metrics=classification", r"^metrics.accuracy: .*for a regression give metrics=regression$"),
    ],
)
def test_a_regression_with_the_loss_or_metric_of_classes_is_refused(left: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        try_example(Experiment.build(composed("model=mlp", "device=cpu", *REGRESSION, left)))


@pytest.mark.parametrize(
    ("outputs", "targets"), [((6,), (6,)), ((6, 1), (6,)), ((6, 1), (6, 1)), ((6, 1, 4), (6, 1, 4))]
)
def test_a_loss_of_classes_refuses_numbers(outputs: tuple[int, ...], targets: tuple[int, ...]) -> None:
    made = torch.zeros(outputs), torch.full(targets, 0.5)
    with pytest.raises(UsageError, match="loss=mse metrics=regression"):
        check_class_loss(nn.CrossEntropyLoss(), *made)
    with pytest.raises(UsageError, match="loss=mse metrics=regression"):
        check_class_loss(WeightedSamples(nn.CrossEntropyLoss()), made[0], (made[1], torch.ones(6)))
    with pytest.raises(UsageError, match="metrics=regression"):
        check_accuracy("metrics.accuracy", Accuracy(), *made)
    check_class_loss(nn.MSELoss(), *made)


def flat() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))


def test_a_plan_names_the_loss_that_its_trial_fails_in() -> None:
    classes = ("device=cpu", f"model._target_={__name__}.flat", "loss=cross_entropy", "metrics=none")
    keys = ("~model.num_classes", "~model.inputs", "~model.hidden", "~model.dropout")
    with trial_run(composed("model=mlp", *REGRESSION, *classes, *keys, "accum.steps=auto")) as trial:
        with pytest.raises(UsageError, match=r"^loss=CrossEntropyLoss: .*\(n,\)"):
            Planner(trial)


def test_a_loss_of_classes_takes_indices_and_probabilities() -> None:
    scores = torch.zeros(6, 5)
    check_class_loss(nn.CrossEntropyLoss(), scores, torch.full((6, 5), 0.2))
    check_class_loss(nn.CrossEntropyLoss(), scores, torch.zeros(6, dtype=torch.int64))
    check_accuracy("metrics.accuracy", Accuracy(), scores, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"targets from -1 to 2 are no probabilities; .*loss=mse"):
        check_class_loss(nn.CrossEntropyLoss(), scores, torch.tensor([-1.0, 2, 0, 0, 0]).expand(6, 5))


def test_the_groups_of_a_sweep_choose_their_monitor() -> None:
    assert composed().monitor == "eval/accuracy" and composed().mode == "max"
    assert composed("metrics=none").monitor == "eval/loss"
    assert composed("metrics=regression", "monitor=eval/rmse").monitor == "eval/rmse"


def jobs_of(shift: float, metric: str = "mae") -> list:
    return [
        job(
            f"accum.steps={k}",
            f"seed={seed}",
            final={metric: 200.0 + seed + shift * (k - 1) * (1 + 0.1 * seed), "loss": 0.5},
            monitor=f"eval/{metric}",
        )
        for k in (1, 2)
        for seed in range(5)
    ]


def test_the_margin_is_one_per_cent_of_the_reference() -> None:
    same, other = reported(sweep(*jobs_of(0.5))), reported(sweep(*jobs_of(5.0)))
    assert same.metric.key == "mae" and same.margin is None
    assert same.comparisons[0].margin == pytest.approx(2.02)
    assert same.verdict is Verdict.equivalent and other.verdict is Verdict.different
    assert conclusion(same).endswith("equivalent to accum.steps=1: test mae within 1% of the reference.")
    given = reported(sweep(*jobs_of(0.5)), margin=0.1)
    assert given.verdict is Verdict.different and given.margin_text == "0.1"


def test_a_reference_of_zero_gives_no_margin() -> None:
    zero = [job(f"accum.steps={k}", f"seed={s}", final={"loss": 0.0}) for k in (1, 2) for s in range(3)]
    report = reported(sweep(*zero))
    assert report.comparisons[0].margin is None and report.verdict is Verdict.undecided
