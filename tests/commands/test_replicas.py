"""Many seeds trained as one: each is the run that it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accumexp.accum.loss import MeanOverSamples
from accumexp.training.callbacks import Callback
from accumexp.training.trainer import Trainer

from ..support.replicas import EXACT, MLP, both, far, same

WEIGHTED = [
    "+loss.ignore_index=3",
    "+loss.weight={_target_:torch.tensor,data:[1.0,2.0,1.0,1.0,3.0,1.0,1.0,2.0,1.0,1.0]}",
]
LABELS = ["+loss.label_smoothing=0.1", "+loss.ignore_index=7"]
AUGMENT = ["+data.augment._target_=accumexp.data.ShiftAndFlip"]
WHOLE_RUNS = {
    "momentum": ["accum.steps=3"],
    "clipped adamw": ["optimizer=adamw", "accum.steps=4", "trainer.clip_norm=0.3", "scheduler=cosine"],
    "sum of means": ["accum.steps=4", "accum.reduction=sum", "optimizer=sgd"],
    "class weights": ["accum.steps=4", *WEIGHTED],
    "weighted sum of means": ["accum.steps=4", "accum.reduction=sum", *LABELS],
    "elementwise loss": ["accum.steps=2", "loss=mse", "optimizer=rmsprop"],
    "loss scale": ["accum=loss_scaled", "accum.steps=3", "accum.growth_interval=4", "trainer.clip_norm=1"],
    "augmented": ["accum.steps=2", *AUGMENT],
    "noise scale": ["accum.steps=3", "callbacks=noise_scale", "trainer.log_every=1"],
    "average": ["+callbacks.ema._target_=accumexp.training.callbacks.EMA", "optimizer=adam"],
    "another optimizer": ["optimizer=sgd", "optimizer._target_=torch.optim.Adafactor", "accum.steps=2"],
}


@pytest.mark.parametrize("overrides", WHOLE_RUNS.values(), ids=WHOLE_RUNS.keys())
def test_each_of_many_seeds_is_the_run_that_it_is_alone(overrides: list[str]) -> None:
    alone, together, errors = both(*overrides)
    assert errors == [None] * 3
    same(alone, together)


class Mixed(nn.Module):
    """BatchNorm, a weight that two layers share, and a parameter that nothing uses."""

    def __init__(self, inputs: int, num_classes: int, hidden: list[int], dropout: float) -> None:
        super().__init__()
        (width,) = hidden
        first = nn.Linear(inputs, width, bias=False)  # whose gradient would be nothing but rounding
        self.into = nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(width), nn.ReLU())
        self.once, self.again = nn.Linear(width, width), nn.Linear(width, width)
        self.again.weight = self.once.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.out = nn.Linear(width, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.again(self.once(self.into(inputs)).relu()))


class Scaled(Mixed):
    """With a parameter that is a single number."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * super().forward(inputs)


class Capped(Callback):
    """A hook of the optimizer that keeps the weights small after each step."""

    def run_begin(self, trainer: Trainer) -> None:
        def cap(*_: Any) -> None:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.clamp_(-0.05, 0.05)

        trainer.optimizer.register_step_post_hook(cap)


class ByLabel(MeanOverSamples):
    """Samples of the higher classes weigh twice."""

    def weight(self, targets: Any) -> Any:
        return (1 + (targets > 4)).sum()

    def total(self, outputs: Any, targets: Any) -> Tensor:
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return (losses * (1 + (targets > 4))).sum()


def by_label() -> ByLabel:
    return ByLabel(nn.CrossEntropyLoss())


def model_overrides(name: str) -> list[str]:
    return [*MLP, f"model._target_={__name__}.{name}"]


def test_a_parameter_of_a_single_number_is_clipped_with_the_others() -> None:
    alone, together, errors = both("accum.steps=3", "trainer.clip_norm=0.3", model=model_overrides("Scaled"))
    assert errors == [None] * 3
    same(alone, together)


def test_hooks_of_an_optimizer_are_heard_for_each_replica() -> None:
    alone, together, _ = both("accum.steps=3", f"+callbacks.cap._target_={__name__}.Capped")
    assert all(p.abs().max() <= 0.05 for trainer, _, _ in together for p in trainer.model.parameters())
    same(alone, together)


def test_what_a_loss_of_its_own_weighs_is_asked_for_each_replica() -> None:
    alone, together, _ = both("accum.steps=3", f"loss._target_={__name__}.by_label")
    same(alone, together)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_statistics_tied_weights_and_unused_parameters_are_those_of_the_run_alone(optimizer: str) -> None:
    decay = "optimizer.weight_decay=0.1"
    alone, together, _ = both(
        "accum.steps=3", f"optimizer={optimizer}", decay, model=model_overrides("Mixed")
    )
    same(alone, together)
    for (trainer, _, _), (other, _, _) in zip(alone, together, strict=True):
        assert other.model.get_buffer("into.2.num_batches_tracked") == 3 * (4 * 3 + 1)
        assert far(dict(trainer.model.named_buffers()), dict(other.model.named_buffers())) <= EXACT
        assert other.model.get_parameter("unused").eq(1).all()


def test_in_fp32_and_bf16_they_differ_by_rounding_alone() -> None:
    for precision, bound in (("fp32", 1e-4), ("bf16", 0.1)):
        alone, together, _ = both(f"precision={precision}", "accum.steps=2", "trainer.epochs=1")
        for (trainer, memory, _), (other, others, _) in zip(alone, together, strict=True):
            assert far(trainer.model.state_dict(), other.model.state_dict()) <= bound
            assert memory.series("train/loss") == [
                (update, pytest.approx(loss, rel=bound)) for update, loss in others.series("train/loss")
            ]
