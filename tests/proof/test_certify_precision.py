"""Changed batches, repeated draws, and loops that are wrong in fp32 alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accumexp.proof import Certificate, certify

CROSS_ENTROPY = nn.CrossEntropyLoss()
Spoil = Callable[[nn.Module, Any, Any], None]


def model(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 24), nn.Tanh(), *middle, nn.Linear(24, 5))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 20, generator=generator), torch.randint(0, 5, (64,), generator=generator)


def loop(spoil: Spoil | None = None, micro: int = 16, loss: Any = CROSS_ENTROPY) -> Callable[..., None]:
    """A right loop of micro-batches of 16, but for what `spoil` does before the optimizer's step."""

    def train_window(model: nn.Module, optimizer: Any, batch: Any, steps: int) -> None:
        optimizer.zero_grad()
        for x, y in zip(batch[0].split(micro), batch[1].split(micro), strict=True):
            (loss(model(x), y) * len(y) / len(batch[1])).backward()
        if spoil is not None:
            spoil(model, optimizer, batch)
        optimizer.step()

    return train_window


def certificate(
    train_window: Callable[..., Any], made: nn.Module | None = None, **options: Any
) -> Certificate:
    return certify(train_window, made or model(), CROSS_ENTROPY, data(), 4, updates=6, **options)


def narrow(model: nn.Module) -> bool:
    return next(model.parameters()).dtype is not torch.float64


def test_a_loop_that_changes_its_batch_is_not_certified_and_changes_nothing_of_ours() -> None:
    inputs, labels = data()

    def clamped(model: nn.Module, optimizer: Any, batch: Any, steps: int) -> None:
        batch[1].clamp_(max=2)
        loop()(model, optimizer, batch, steps)

    before = labels.clone()
    result = certify(clamped, model(nn.Dropout(0.5)), CROSS_ENTROPY, (inputs, labels), 4, updates=2)
    assert result.verdict == "not proved"
    assert torch.equal(labels, before)


def test_masks_that_are_drawn_again_are_named() -> None:
    def seeded(model: nn.Module, optimizer: Any, batch: Any, steps: int) -> None:
        optimizer.zero_grad()
        for x, y in zip(batch[0].split(16), batch[1].split(16), strict=True):
            torch.manual_seed(7)
            (CROSS_ENTROPY(model(x), y) * len(y) / len(batch[1])).backward()
        optimizer.step()

    result = certificate(seeded, model(nn.Dropout(0.5)))
    assert result.verdict == "not proved"
    assert "3 micro-batches draw what another one of their window has drawn" in str(result)
    assert certificate(loop(), model(nn.Dropout(0.5))).verdict == "proved up to"


def carried() -> Spoil:
    kept: dict[nn.Parameter, Tensor] = {}

    def carry(model: nn.Module, optimizer: Any, batch: Any) -> None:
        for parameter in model.parameters() if narrow(model) else ():
            assert parameter.grad is not None
            before, kept[parameter] = kept.get(parameter), parameter.grad.clone()
            if before is not None:
                parameter.grad += before

    return carry


def full_size(model: nn.Module, optimizer: Any, batch: Any) -> None:
    for parameter in model.parameters() if narrow(model) and len(batch[1]) < 64 else ():
        assert parameter.grad is not None
        parameter.grad *= len(batch[1]) / 64


def mostly() -> Spoil:
    windows = [0]

    def hundredfold(model: nn.Module, optimizer: Any, batch: Any) -> None:
        windows[0] += narrow(model)
        for parameter in model.parameters() if narrow(model) and windows[0] % 7 else ():
            assert parameter.grad is not None
            parameter.grad *= 100

    return hundredfold


def twice(model: nn.Module, optimizer: Any, batch: Any) -> None:
    if narrow(model):
        optimizer.step()


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (carried(), "gradient, 7 updates, fp32"),
        (full_size, "gradient, 7 updates, fp32"),
        (mostly(), "gradient, 7 updates, fp32"),
        (twice, "number of updates, fp32"),
    ],
    ids=["carried over", "a smaller window divided by a whole one's size", "six of seven", "stepped twice"],
)
def test_what_is_wrong_in_fp32_alone_is_seen(spoil: Spoil, check: str) -> None:
    result = certificate(loop(spoil))
    assert check in {failed.name for failed in result.failed}


def test_clipping_that_never_acts_is_said() -> None:
    result = certificate(loop(), clip_norm=50.0)
    assert str(result) == "proved up to clipping, which never acted" and result.proved


def test_class_weights_in_fp64_stay_as_they_are() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1, 2, 3, 4, 5.0], dtype=torch.float64) / 3)
    assert loss.weight is not None
    before = loss.weight.clone()

    def train_window(model: nn.Module, optimizer: Any, batch: Any, steps: int) -> None:
        optimizer.zero_grad()
        assert loss.weight is not None
        whole = loss.weight[batch[1]].sum()
        for x, y in zip(batch[0].split(16), batch[1].split(16), strict=True):
            (loss(model(x), y) * loss.weight[y].sum() / whole).backward()
        optimizer.step()

    inputs, labels = data()
    options = {"updates": 2, "precision": torch.float64}
    result = certify(train_window, model().double(), loss, (inputs.double(), labels), 4, **options)
    assert str(result) == "proved" and torch.equal(loss.weight, before)


class Masked(nn.Module):
    """A buffer of infinities, as causal masks have."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((24, 24), -torch.inf).triu(1))

    def forward(self, values: Tensor) -> Tensor:
        return values + values @ self.mask.softmax(1)


class SequenceFirst(nn.Module):
    """Dropout over (length, samples, features), with as many positions as samples in a micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.weight = nn.Parameter(torch.randn(16, 1, 1))

    def forward(self, values: Tensor) -> Tensor:
        return self.dropout(self.weight * values).mean(0)


@pytest.mark.parametrize("middle", [Masked, SequenceFirst])
def test_right_windows_that_a_review_found_refused(middle: type[nn.Module]) -> None:
    result = certificate(loop(), model(middle()))
    assert result.proved, str(result)


def test_a_wrong_rate_of_the_second_group_is_named() -> None:
    def groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.01}], lr=0.1)

    def wrong(model: nn.Module, optimizer: Any, batch: Any) -> None:
        optimizer.param_groups[1]["lr"] = 0.03

    result = certificate(loop(wrong), optimizer=groups)
    assert "the learning rate of parameter group 1 is 3 times the schedule's" in str(result)
