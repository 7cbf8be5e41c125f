"""What a loss averages over is measured on one batch, and a run whose window would not weigh it so warns."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from accumexp.proof.additivity import Average, loss_average
from accumexp.training.experiment import Experiment
from accumexp.training.preflight import check_experiment

from ..support.experiments import composed

N, T, C = 6, 8, 5


@dataclass(frozen=True)
class Outputs:
    logits: Tensor
    mask: Tensor


def tokens(padded: bool = True, value: int = -100) -> tuple[Tensor, Tensor]:
    """Outputs (n, classes, tokens) and targets, of which sample k ends with k ignored ones."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(N, C, T, generator=generator)
    targets = torch.randint(1, C, (N, T), generator=generator)
    for k in range(N if padded else 0):
        targets[k, T - k :] = value
    return outputs, targets


VALID = sum(T - k for k in range(N))


def masked(outputs: Tensor, targets: Tensor, mask: Tensor, eps: float = 0.0) -> Tensor:
    losses = F.cross_entropy(outputs, targets.clamp(min=0), reduction="none")
    return (losses * mask).sum() / (mask.sum() + eps)


def mean_over_samples(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs, targets, reduction="none", ignore_index=-100).sum(1)
    return (losses / (targets != -100).sum(1)).mean()


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    flat = F.normalize(outputs.flatten(1), dim=1)
    return F.cross_entropy(flat @ flat.T / 0.1, torch.arange(len(flat)))


def two_denominators(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets) + outputs.square().mean()


@pytest.mark.parametrize(
    ("loss", "value", "weight", "description"),
    [
        (F.cross_entropy, -100, VALID, f"{VALID} valid targets (those other than -100)"),
        (functools.partial(F.cross_entropy, ignore_index=-1), -1, VALID, "other than -1)"),
        (functools.partial(F.cross_entropy, ignore_index=3), 3, None, "other than 3)"),
        (
            lambda o, t: F.cross_entropy(o, t.long(), ignore_index=0),
            0,
            VALID,
            f"{VALID} targets other than 0",
        ),
        (lambda o, t: masked(o, t, t > -5), -7, VALID, f"{VALID} valid targets (those not below 0)"),
        (lambda o, t: masked(o, t, t != -100, 1e-8), -100, VALID, "other than -100)"),
        (lambda o, t: masked(o, t, t == 2), -100, None, "targets equal to 2"),
    ],
)
def test_the_items_of_a_mean_are_counted_and_named(
    loss: Callable[..., Tensor], value: int, weight: float | None, description: str
) -> None:
    outputs, targets = tokens(value=value)
    average = loss_average(loss, outputs, targets)
    assert average is not None and average.kind == "items" and description in average.description
    assert weight is None or average.weight == weight
    assert average.reason == f"your loss averages over {average.description}, not {N} samples"
    assert "weight(targets)" in average.advice


def test_masks_weights_and_nested_values() -> None:
    outputs, targets = tokens()
    mask, weights = targets != -100, torch.arange(1.0, N + 1)
    targets = targets.clamp(min=1)

    def weighted(o: Tensor, t: tuple[Tensor, Tensor]) -> Tensor:
        return (F.cross_entropy(o, t[0], reduction="none").mean(1) * t[1]).sum() / t[1].sum()

    average = loss_average(weighted, outputs, (targets, weights))
    assert average is not None and average.description == "weights among the targets, whose sum is 21"
    for each in (mask, mask.float()):
        average = loss_average(
            lambda o, t: masked(o, t["y"], t["mask"]), outputs, {"y": targets, "mask": each}
        )
        assert (
            average is not None and average.description == f"the {VALID} elements of a mask among the targets"
        )
    average = loss_average(lambda o, t: masked(o.logits, t, o.mask), Outputs(outputs, mask), targets)
    assert average is not None and average.description == f"the {VALID} elements of a mask among the outputs"
    assert average.advice.startswith("put them into the targets")
    # Missing values of a regression.
    values = torch.randn(N, 3)
    values[0, 1:] = torch.nan
    average = loss_average(lambda o, t: (o[:, :3, 0] - t).square().nanmean(), outputs, values)
    assert average is not None and average.description == "16 targets that are not nan"
    class_weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    average = loss_average(functools.partial(F.cross_entropy, weight=class_weights), outputs, targets)
    assert average is not None and average.kind == "items" and average.weight != average.weight


def test_a_batch_without_ignored_targets_is_measured_with_some() -> None:
    outputs, targets = tokens(padded=False)
    average = loss_average(F.cross_entropy, outputs, targets)
    assert average == Average("items", N * T, N, f"{N * T} valid targets (those other than -100)")
    assert loss_average(lambda o, t: masked(o, t, t != 0), outputs, targets) is not None
    everything = {"y": targets, "mask": torch.ones(N, T)}
    average = loss_average(lambda o, t: masked(o, t["y"], t["mask"]), outputs, everything)
    assert average is not None and average.description == f"the {N * T} elements of a mask among the targets"
    # A class for each sample has no padding: as many items as samples, in every batch.
    assert loss_average(F.cross_entropy, outputs[..., 0], targets[:, 0]) is None
    # Equal losses, as after a last layer of zeros, would hide the weights.
    padded = tokens()[1]
    assert loss_average(F.cross_entropy, torch.zeros_like(outputs), padded) is not None
    assert loss_average(mean_over_samples, torch.zeros_like(outputs), padded) is None


@pytest.mark.parametrize(
    "loss",
    [
        mean_over_samples,
        lambda o, t: F.mse_loss(o.mean(2), F.one_hot(t[:, 0].clamp(min=0), C).to(o.dtype)),
        lambda o, t: F.cross_entropy(o, t.clamp(min=0), reduction="none"),  # the window takes its mean
        lambda o, t: o.square().flatten(1).sum(1).sum() / (len(o) + 1e-8),
        nn.CrossEntropyLoss(ignore_index=-100),
        nn.CrossEntropyLoss(ignore_index=-100, reduction="none"),
        nn.CrossEntropyLoss(ignore_index=-100, weight=torch.arange(1.0, C + 1)),
        nn.CrossEntropyLoss(ignore_index=-100, reduction="sum"),
    ],
)
def test_losses_that_a_window_weighs_right_are_none(loss: Callable[..., Tensor]) -> None:
    assert loss_average(loss, *tokens()) is None


def test_a_sum_of_two_means_and_a_shift_by_one_are_named() -> None:
    outputs, targets = tokens()
    average = loss_average(two_denominators, outputs, targets)
    assert average is not None
    assert average.description == f"{N} samples and over {VALID} valid targets (those other than -100)"
    assert average.reason.startswith(f"your loss adds means over {N} samples and over {VALID}")
    for loss in (contrastive, lambda o, t: o.square().mean().sqrt()):
        average = loss_average(loss, outputs, targets)
        assert average is not None and not average.description
    average = loss_average(lambda o, t: F.cross_entropy(o[..., :-1], t[:, 1:]), outputs, targets)
    assert average is not None and average.weight == VALID - N
    assert "after the first of each sample" in average.description


def test_sums_totals_and_coupled_losses() -> None:
    outputs, targets = tokens()
    summed = loss_average(functools.partial(F.cross_entropy, reduction="sum"), outputs, targets)
    assert summed is not None and summed.kind == "sum" and "`reduction`" in summed.advice
    for loss in (contrastive, two_denominators, lambda o, t: o.square().mean().sqrt()):
        average = loss_average(loss, outputs, targets)
        assert average is not None and average.kind == "coupled"

    class Valid:
        def __init__(self, divides: bool) -> None:
            self.divides = divides

        def weight(self, targets: Tensor) -> Tensor:
            return (targets != -100).sum()

        def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(outputs, targets, reduction="mean" if self.divides else "sum")

    assert loss_average(Valid(False), outputs, targets) is None
    average = loss_average(Valid(True), outputs, targets)
    assert average is not None and average.kind == "total" and "`total`" in average.advice


def test_a_loss_that_the_model_computes_is_measured_on_parts_of_the_inputs() -> None:
    outputs, targets = tokens()

    class WithLoss(nn.Module):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": F.cross_entropy(x, labels), "logits": x}

    inputs = {"x": outputs, "labels": targets}
    model = WithLoss()
    made = model(**inputs)

    def loss(o: Any, t: Any) -> Tensor:
        return o["loss"]

    assert loss_average(loss, made, targets) is None  # the value of the whole batch has no parts
    average = loss_average(loss, made, targets, model, inputs)
    assert average is not None and average.weight == VALID


class Running(nn.Module):
    """A mean over valid targets that keeps a running mean of its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(()))
        self.calls = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, targets)
        self.calls += 1
        self.mean.lerp_(loss.detach().to(self.mean.dtype), 0.1)
        return loss + self.mean


def test_state_draws_and_odd_losses() -> None:
    outputs, targets = tokens()
    running = Running()
    before = torch.get_rng_state()
    average = loss_average(running, outputs, targets)
    assert average is not None and average.weight == VALID
    assert running.calls == 0 and not running.mean

    def smoothed(o: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(F.dropout(o, 0.3), t)

    def fails(o: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("no")

    def whole_alone(o: Tensor, t: Tensor) -> Tensor:
        if len(o) < N:
            raise ValueError("a whole batch is needed")
        return F.cross_entropy(o, t)

    odd: list[Callable[..., Any]] = [
        smoothed,
        fails,
        whole_alone,
        lambda o, t: {"loss": o.mean()},
        lambda o, t: o.mean() * float("nan"),
        lambda o, t: o.mean() * random.random(),
        lambda o, t: None,
    ]
    for loss in odd:
        assert loss_average(loss, outputs, targets) is None
    assert loss_average(F.cross_entropy, None, None) is None
    assert loss_average(F.cross_entropy, outputs[:1], targets[:1]) is None
    assert torch.equal(before, torch.get_rng_state())

    def halves(o: Tensor, t: Tensor) -> Tensor:
        if len(o) < 3:
            raise ValueError("statistics need three samples")
        return F.cross_entropy(o, t)

    average = loss_average(halves, outputs, targets)
    assert average is not None and average.weight == VALID


class Tokens(TensorDataset):
    """Sequences of eight tokens, of which some are padding."""

    def __init__(self, **_: Any) -> None:
        generator = torch.Generator().manual_seed(1)
        targets = torch.randint(0, C, (24, T), generator=generator)
        targets[torch.rand(24, T, generator=generator) < torch.linspace(0, 0.9, 24)[:, None]] = -100
        super().__init__(torch.randn(24, 3, T, generator=generator), targets)


class Tagger(nn.Module):
    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(3, C, 1)
        self.norm = nn.BatchNorm1d(C, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolution(x))


class TaggerWithLoss(Tagger):
    """Returns a loss of its own beside the outputs."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return {"logits": logits, "loss": logits.square().mean()}


def own_loss(outputs: Any, targets: Tensor) -> Tensor:
    return outputs["loss"]


class Valid(nn.Module):
    def weight(self, targets: Tensor) -> Tensor:
        return (targets != -100).sum()

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")


PLAIN = "loss._target_=torch.nn.functional.cross_entropy +loss._partial_=true"


def warnings_of(caplog: pytest.LogCaptureFixture, loss: str, *overrides: str) -> list[str]:
    here = __name__
    sets = [f"data.{name}._target_={here}.Tokens" for name in ("train", "test")]
    config = composed(
        *("device=cpu", "data.batch_size=8", "data.num_classes=5", "metrics=none", "monitor=eval/loss"),
        *sets,
        f"model._target_={here}.Tagger",
        *loss.split(),
        *overrides,
    )
    caplog.clear()
    experiment = Experiment.build(config)
    before = {name: value.clone() for name, value in experiment.model.state_dict().items()}
    check_experiment(experiment)
    assert all(torch.equal(before[name], value) for name, value in experiment.model.state_dict().items())
    return [record.getMessage() for record in caplog.records]


def test_a_run_warns_of_a_loss_that_its_window_does_not_weigh(caplog: pytest.LogCaptureFixture) -> None:
    (line,) = warnings_of(caplog, PLAIN, "accum.steps=4")
    assert line.startswith("loss (torch.nn.functional.cross_entropy): your loss averages over ")
    assert "valid targets (those other than -100), not 4 samples; give it `weight(targets)`" in line
    assert not warnings_of(caplog, PLAIN, "accum.steps=1")  # the larger batch itself
    assert not warnings_of(caplog, PLAIN, "accum.steps=4", "accum.reduction=sum")
    assert not warnings_of(caplog, "loss._target_=torch.nn.CrossEntropyLoss", "accum.steps=4")
    assert not warnings_of(caplog, f"loss._target_={__name__}.Valid", "accum.steps=4")
    node = f"loss._target_={__name__}.own_loss +loss._partial_=true"
    assert not warnings_of(caplog, node, "accum.steps=4", f"model._target_={__name__}.TaggerWithLoss")
