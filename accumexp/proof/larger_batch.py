"""The larger batch: the whole batch in one forward and backward pass, independent of the window's code.

Its gradient comes from `torch.func.functional_call` and one `torch.autograd.grad`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..accum.batch import Nested, batch_size
from .problem import WholeBatch, unsharded

Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class LargerBatch:
    """The result of one pass over the whole batch.

    Attributes:
        loss: its mean loss, shape ().
        gradient: by parameter name; zeros where the loss does not depend on a parameter.
        buffers: the model's buffers after the forward pass.
        outputs: the model's outputs, detached.
    """

    loss: Tensor
    gradient: Gradient
    buffers: dict[str, Tensor]
    outputs: Any


def larger_batch(
    model: nn.Module,
    loss: Callable[..., Any],
    batch: WholeBatch,
    autocast: torch.dtype | None = None,
    weight: float | Tensor | None = None,
    on_copies: Callable[[list[Tensor]], Any] | None = None,
    scale: float = 1.0,
) -> LargerBatch:
    """Loss and gradient of `loss(model(inputs), targets)` over all of `batch`; `model` is not changed.

    Args:
        weight: divides the sum of the items' losses, instead of their own weight.
        on_copies: called with the copies of parameters and buffers that the pass uses.
        scale: multiplies the loss before backward, and divides the gradient in fp64.
    """
    parameters = {
        name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()
    }
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    if on_copies is not None:
        on_copies([*parameters.values(), *buffers.values()])
    inputs, targets = batch
    arguments, keywords = _arguments(inputs)
    device = next(iter(parameters.values())).device
    with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
        outputs = functional_call(model, (parameters, buffers), arguments, keywords)
        value = mean_loss(loss, outputs, targets)
        if weight is not None:
            value = value * (loss_weight(loss, targets) / weight)
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    raw = torch.autograd.grad(value * scale, list(trained.values()), allow_unused=True)
    gradient = {
        name: torch.zeros_like(p) if g is None else dense(g) if scale == 1 else dense(g).double() / scale
        for (name, p), g in zip(trained.items(), raw, strict=True)
    }
    detached = outputs.detach() if isinstance(outputs, Tensor) else outputs
    return LargerBatch(value.detach(), gradient, {n: b.detach() for n, b in buffers.items()}, detached)


def dense(gradient: Tensor) -> Tensor:
    """`gradient`, which embeddings may make sparse, as a dense tensor."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def mean_loss(loss: Callable[..., Any], outputs: Any, targets: Any) -> Tensor:
    """The mean loss of a batch, shape (): the value of `loss`, or its `total` over its `weight`."""
    if isinstance(outputs, Tensor) and outputs.dtype in (torch.float16, torch.bfloat16):
        outputs = outputs.float()
    if total := getattr(loss, "total", None):
        return total(outputs, targets) / loss.weight(targets)  # type: ignore[attr-defined]
    value = loss(outputs, targets)
    if value.dim() and isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):  # reduction="none"
        return value.sum() / loss_weight(loss, targets)
    return value.mean() if value.dim() else value


def loss_weight(loss: Callable[..., Any], targets: Any) -> float | Tensor:
    """The denominator of the mean of `loss` over `targets`: `loss.weight(targets)`, or the number of items.

    With class indices the mean is over the targets that are not ignored, each with its class's weight
    (torch.nn.CrossEntropyLoss).
    """
    if hasattr(loss, "total"):
        return loss.weight(targets)  # type: ignore[attr-defined]
    if getattr(loss, "reduction", None) == "sum":
        return 1.0
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and not targets.is_floating_point():
        counted = targets[targets != loss.ignore_index]
        return float(len(counted)) if loss.weight is None else loss.weight[counted].sum()
    return float(batch_size(targets))


def norm(gradient: Mapping[str, Tensor]) -> float:
    """The 2-norm of the whole gradient."""
    return sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5


def dot(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The inner product in fp64, over the parameters of `one` that `other` has."""
    return sum(float((g.double() * other[name].double()).sum()) for name, g in one.items() if name in other)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The 2-norm of the difference, relative to that of `expected`. A collective call on sharded tensors.

    0 for equal bits, infinities among them; inf for different shapes.
    """
    actual, expected = unsharded(actual.detach()), unsharded(expected.detach())
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = dense(actual), dense(expected)
    if torch.equal(actual, expected):
        return 0.0
    size = float(expected.double().norm())
    return float((actual.double() - expected.double()).norm()) / (size or 1.0)


def clipped(gradient: Gradient, clip_norm: float | None) -> Gradient:
    """`gradient` scaled to a 2-norm of at most `clip_norm`, as torch.nn.utils.clip_grad_norm_ does."""
    if clip_norm is None:
        return gradient
    factor = clip_factor(norm(gradient), clip_norm)
    return {name: g * factor for name, g in gradient.items()}


def clip_factor(size: float, clip_norm: float | None) -> float:
    """The factor by which a gradient of 2-norm `size` is clipped."""
    return 1.0 if clip_norm is None else min(1.0, clip_norm / (size + 1e-6))


def clamped(gradient: Gradient, clip_value: float | None) -> Gradient:
    """`gradient` with elements of at most `clip_value`, as torch.nn.utils.clip_grad_value_ does.

    No two elements are farther apart after it than before: bounds of absolute errors go on to hold.
    """
    if clip_value is None:
        return gradient
    return {name: g.clamp(-clip_value, clip_value) for name, g in gradient.items()}


def call(model: nn.Module, inputs: Nested) -> Any:
    """`model` on `inputs`: a mapping as keywords, a tuple or list as positional arguments."""
    arguments, keywords = _arguments(inputs)
    return model(*arguments, **keywords)


def _arguments(inputs: Nested) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {}
