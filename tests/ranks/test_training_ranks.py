"""Law 1: weights that several ranks have trained are those of the larger batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from accumexp.accum import OptimizerStep, Window, steps_for

from ..support.ranks import on_ranks
from ..support.reference import classification, relative_error, small_model
from .windows import SAMPLES, STEPS, own_part, wrapped

UPDATES = 20
CLIP = 0.4


def trained(how: str, steps: int) -> dict[str, Tensor]:
    """Weights after 20 updates, every fourth of them a ragged, smaller one."""
    model = wrapped(small_model(), how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    window = Window(model, nn.CrossEntropyLoss(), steps)
    step = OptimizerStep(window, optimizer, clip_norm=CLIP)
    for update in range(UPDATES):
        size = SAMPLES if update % 4 != 3 else 7
        now = steps_for(size, SAMPLES, steps)
        inputs, targets, counted = own_part(classification(size), now)
        optimizer.zero_grad(set_to_none=not window.sync.keeps_gradients)
        window.backward(inputs, targets, steps=now, samples=counted)
        step()
    weights = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights.items()}  # pyright: ignore


def grid_trained(how: str) -> dict[int, dict[str, Tensor]]:
    return {steps: trained(how, steps) for steps in STEPS}


def plainly_trained() -> dict[str, Tensor]:
    """The same by hand: momentum, weight decay and clipping written out, the gradient by torch.func."""
    model = small_model()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in weights.items()}
    for update in range(UPDATES):
        inputs, targets = classification(SAMPLES if update % 4 != 3 else 7)

        def objective(
            values: dict[str, Tensor], inputs: Tensor = inputs, targets: Tensor = targets
        ) -> Tensor:
            return nn.functional.cross_entropy(functional_call(model, values, (inputs,)), targets)

        gradient = grad(objective)(weights)
        norm = torch.sqrt(sum((g.square().sum() for g in gradient.values()), torch.zeros(())))
        shrink = min(1.0, CLIP / (norm.item() + 1e-6))
        for name, weight in weights.items():
            velocity[name] = 0.9 * velocity[name] + shrink * gradient[name] + 1e-3 * weight
            weights[name] = weight - 0.1 * velocity[name]
    return weights


@pytest.mark.parametrize(("how", "world"), [("adding", 1), ("adding", 2), ("adding", 4), ("sharded", 3)])
def test_law_1_weights_after_twenty_updates_are_the_larger_batchs(
    tmp_path: Path, how: str, world: int
) -> None:
    expected = plainly_trained()
    for by_steps in on_ranks(world, tmp_path, grid_trained, how):
        for steps, weights in by_steps.items():
            assert relative_error(weights, expected) <= 1e-9, steps
