"""The larger batch, written again without a line of accumexp: what windows are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad


def larger_batch_gradient(
    model: nn.Module, criterion: Callable[[Any, Any], Tensor], inputs: Any, targets: Any
) -> dict[str, Tensor]:
    """The gradient of `criterion(model(inputs), targets)` by torch.func, in one piece."""
    return larger_batch(model, criterion, inputs, targets)[0]


def larger_batch(
    model: nn.Module, criterion: Callable[[Any, Any], Tensor], inputs: Any, targets: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient, and the buffers that the forward leaves; the model stays as it is.

    `inputs` that are a dict are passed by name.
    """
    args, named = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}

    def objective(values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        # Copied in here, because what is differentiated may only write to what it has made itself.
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        return criterion(functional_call(model, (values, buffers), args, named), targets), buffers

    return grad(objective, has_aux=True)(parameters)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative 2-norm error over the parameters; all parameters must be there."""
    assert actual.keys() == expected.keys()
    return max(
        ((actual[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-300)).item()
        for name in expected
    )


def small_model(classes: int = 5, features: int = 6, seed: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, 9), nn.Tanh(), nn.Linear(9, classes)).double()


def classification(samples: int, classes: int = 5, features: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(samples)
    inputs = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, classes, (samples,), generator=generator)
