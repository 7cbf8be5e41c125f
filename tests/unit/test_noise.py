"""The gradient noise scale against plain loops, closed forms and numpy, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from accumexp.accum import LossScale, Window
from accumexp.training.noise_scale import GradientNoise, NoiseScale, Sums, solved
from accumexp.training.sample_noise_scale import SampleNoiseScale

from ..support.experiments import trainer_of
from ..support.noise import (
    MICRO,
    NAMES,
    SAMPLE,
    each_samples_gradient,
    flat_gradient,
    look,
    of_parts,
    smoothed,
)
from ..support.reference import classification, small_model

# The micro-batches' own gradients ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [(), ("trainer.clip_norm=0.01",), ("accum.loss_scale=static", "accum.init_scale=1024")]
)
@pytest.mark.parametrize("steps", [2, 3, 4, 7])
def test_the_micro_batches_estimate_is_that_of_a_plain_loop(steps: int, options: tuple[str, ...]) -> None:
    trainer, memory = trainer_of(
        MICRO, f"accum.steps={steps}", "data.batch_size=100", "trainer.log_every=1", *options
    )
    trainer.total_updates = 1
    batch: Any = next(iter(trainer.splits.train.epoch(0)))
    sizes = [100 // steps + (k < 100 % steps) for k in range(steps)]
    means, begin = [], 0
    for size in sizes:
        rows = slice(begin, begin + size)
        loss = nn.functional.cross_entropy(trainer.model(batch.inputs[rows]), batch.targets[rows])
        means.append(flat_gradient(trainer.model, loss))
        begin += size
    expected = of_parts(means, [float(size) for size in sizes], 100)
    assert expected[2] > 0, "there must be a point to log"
    trainer.fit()
    for name, value in zip(NAMES, expected, strict=True):
        assert memory.series(name) == [(1, pytest.approx(value, rel=1e-9))]


def test_for_equal_micro_batches_it_is_the_papers_estimate() -> None:
    """Appendix A.1: equations A.2 for |G|^2 and tr(Sigma) from gradients of two batch sizes."""
    model, (inputs, targets) = small_model(), classification(60)
    small, big = 15, 60
    gradients = [
        flat_gradient(model, nn.functional.cross_entropy(model(inputs[rows]), targets[rows]))
        for rows in (slice(begin, begin + small) for begin in range(0, big, small))
    ]
    of_small = np.mean([(g**2).sum() for g in gradients])
    of_big = (np.mean(gradients, axis=0) ** 2).sum()
    square = (big * of_big - small * of_small) / (big - small)
    variance = (of_small - of_big) / (1 / small - 1 / big)
    callback = NoiseScale()
    look(callback, Window(model, nn.CrossEntropyLoss(), 4), inputs, targets)
    assert smoothed(callback) == pytest.approx((variance / square, variance, square), rel=1e-10)


@pytest.mark.parametrize("samples", [48, 50])
def test_under_class_weights_micro_batches_count_by_their_weight(samples: int) -> None:
    factors = torch.tensor([1.0, 5.0, 0.1, 2.0, 0.0], dtype=torch.float64)
    model, (inputs, targets) = small_model(), classification(samples)
    targets[:20] = 4  # the first micro-batch weighs nothing
    criterion = nn.CrossEntropyLoss(factors)
    window = Window(model, criterion, 4)
    sizes = [samples // 4 + (k < samples % 4) for k in range(4)]
    parts = [
        (x, y) for x, y in zip(inputs.split(sizes), targets.split(sizes), strict=True) if factors[y].sum()
    ]
    assert len(parts) == 3
    means = [flat_gradient(model, criterion(model(x), y)) for x, y in parts]
    callback = NoiseScale()
    look(callback, window, inputs, targets)
    expected = of_parts(means, [factors[y].sum().item() for _, y in parts], samples)
    assert smoothed(callback) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", ["a sum of means", "a criterion that is a sum"])
def test_another_scale_of_the_gradient_is_no_other_noise(kind: str) -> None:
    inputs, targets = classification(60)
    callbacks = NoiseScale(), NoiseScale()
    look(callbacks[0], Window(small_model(), nn.CrossEntropyLoss(), 4), inputs, targets)
    reduction = "sum" if kind == "a sum of means" else "mean"
    criterion = nn.CrossEntropyLoss(reduction="mean" if reduction == "sum" else "sum")
    look(callbacks[1], Window(small_model(), criterion, 4, reduction=reduction), inputs, targets)
    assert smoothed(callbacks[1]) == pytest.approx(smoothed(callbacks[0]), rel=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("unseen", [0, 1])
def test_the_two_equations_are_without_bias(reduction: str, unseen: int) -> None:
    draws = np.random.default_rng(0)
    truth, spread, weight = np.array([0.6, -0.8]), 12.0, np.array([3.0, 2.0, 2.0, 7.0])
    factors = weight / weight.sum() if reduction == "mean" else np.ones(4)
    estimates = []
    for _ in range(4000):
        means = truth + draws.normal(size=(4, 2)) * np.sqrt(spread / 2 / weight)[:, None]
        whole = (factors[:, None] * means).sum(0)
        alone = slice(0, 4 - unseen)
        squares = (weight[alone] * (means[alone] ** 2).sum(1)).sum()
        sums = Sums(
            squares=float(squares),
            weight_seen=float(weight[alone].sum()),
            seen=4 - unseen,
            own=float(factors.sum()),
            own_square=float((factors**2 / weight).sum()),
            weight=float(weight.sum()),
            samples=28,
        )
        estimates.append(solved(sums, float((whole**2).sum())))
    mean, error = np.mean(estimates, 0), np.std(estimates, 0) / math.sqrt(len(estimates))
    assert np.all(np.abs(mean - [1.0, 2 * spread]) < 3 * error), (mean, error)
    assert np.all(error < [0.1, 0.6]), error


def test_windows_that_do_not_tell_give_no_estimate() -> None:
    # One micro-batch seen alone, and nothing beside it.
    assert all(map(math.isnan, solved(Sums(1.0, 5.0, 1.0, 1.0, 0.2, 5.0, 5.0), 0.2)))
    window = Window(small_model(), nn.CrossEntropyLoss(), 4, loss_scale=LossScale(2.0**10))
    inputs, targets = classification(40)
    callback = NoiseScale()
    look(callback, window, inputs, targets)
    assert callback.estimates == 1
    before = smoothed(callback)
    inputs[25] = math.inf  # an overflow, of which `OptimizerStep` skips the update
    assert look(callback, window, inputs, targets) == {}
    assert callback.estimates == 1 and smoothed(callback) == before


# The gradients of single samples -----------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "chunk"), [(2, 1), (20, 8), (100, 100), (500, 7)])
def test_the_samples_estimate_is_that_of_a_plain_loop(samples: int, chunk: int) -> None:
    trainer, _ = trainer_of(
        SAMPLE, f"+callbacks.noise.samples={samples}", f"+callbacks.noise.chunk={chunk}",
        "data.batch_size=100", "trainer.max_updates=1", "accum.loss_scale=static", "accum.init_scale=1024",
    )  # fmt: skip
    batch: Any = next(iter(trainer.splits.train.epoch(0)))
    gradients = each_samples_gradient(trainer.model, batch.inputs[:samples], batch.targets[:samples])
    expected = of_parts(gradients, [1.0] * len(gradients), len(gradients))
    trainer.fit()
    callback = trainer.callbacks["noise"]
    assert isinstance(callback, SampleNoiseScale)
    assert smoothed(callback) == pytest.approx(expected, rel=1e-9)


def test_the_samples_estimate_under_weights_is_that_of_a_ratio_of_means() -> None:
    factors = torch.tensor([1.0, 5.0, 0.1, 2.0, 0.0], dtype=torch.float64)
    model, (inputs, targets) = small_model(), classification(40)
    w = factors[targets].numpy()[:, None]
    h = np.stack(each_samples_gradient(model, inputs, targets))
    whole = (w * h).sum(0) / w.sum()
    some = (w > 0).sum()
    assert some < 40
    of_mean = some / (some - 1) * ((w * (h - whole)) ** 2).sum() / w.sum() ** 2
    square = (whole**2).sum() - of_mean
    callback = SampleNoiseScale()
    look(callback, Window(model, nn.CrossEntropyLoss(factors), 1), inputs, targets)
    assert smoothed(callback) == pytest.approx((40 * of_mean / square, 40 * of_mean, square), rel=1e-9)


class Weighed(nn.Module):
    """Squared error over samples of the weights in the targets' second column."""

    def weight(self, targets: Tensor) -> Tensor:
        return targets[:, 1].sum()

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (targets[:, 1] * (outputs[:, 0] - targets[:, 0]).square()).sum()


class Regression:
    """Squared error of a linear model at theta, of data y = x theta* + e, x of 5 standard normals.

    A sample's gradient is 2 x (x d - e) with d = theta - theta*, so that G = 2 d and, by the fourth moments
    of a normal, tr(Sigma) = 4 ((5 + 1) |d|^2 + 5 var e).
    """

    square = 4 * 0.3**2 * 5
    variance = 4 * (6 * 0.3**2 * 5 + 5 * 0.5**2)

    def __init__(self) -> None:
        self.model = nn.Linear(5, 1, bias=False).double()
        nn.init.constant_(self.model.weight, 0.3)  # and theta* is 0
        self.generator = torch.Generator().manual_seed(8)

    def batch(self, samples: int) -> tuple[Tensor, Tensor]:
        drawn = torch.randn(samples, 6, generator=self.generator, dtype=torch.float64)
        return drawn[:, :5], 0.5 * drawn[:, 5:]


MAKERS: dict[str, Callable[[], GradientNoise]] = {
    "micro-batches": lambda: NoiseScale(decay=0.0),
    "samples": lambda: SampleNoiseScale(decay=0.0, samples=31),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_estimates_average_to_the_truth_of_a_regression(kind: str) -> None:
    toy, callback = Regression(), MAKERS[kind]()
    window = Window(toy.model, nn.MSELoss(), 4)
    estimates = []
    for _ in range(400):
        look(callback, window, *toy.batch(31))  # 8, 8, 8 and 7
        estimates.append(smoothed(callback)[1:])
    mean, error = np.mean(estimates, 0), np.std(estimates, 0) / math.sqrt(len(estimates))
    assert np.all(np.abs(mean - [toy.variance, toy.square]) < 3 * error), (mean, error)
    assert np.all(error < [0.03 * toy.variance, 0.03 * toy.square]), "too few windows to tell"


@pytest.mark.parametrize("kind", MAKERS)
def test_under_weights_the_variance_is_that_of_the_windows_gradient_times_its_samples(kind: str) -> None:
    toy, callback = Regression(), MAKERS[kind]()
    window = Window(toy.model, Weighed(), 2)
    variances, gradients = [], []
    for _ in range(500):
        inputs, targets = toy.batch(31)
        heavy = torch.rand(31, 1, generator=toy.generator) < 0.3
        look(callback, window, inputs, torch.cat([targets, torch.where(heavy, 9.0, 1.0)], 1))
        variances.append(smoothed(callback)[1])
        gradients.append(toy.model.weight.grad.clone())  # pyright: ignore[reportOptionalMemberAccess]
    drawn = 31 * float(torch.stack(gradients).var(0).sum())
    assert np.mean(variances) == pytest.approx(drawn, rel=0.15)
    assert drawn > 1.4 * toy.variance, "weights must have mattered"
