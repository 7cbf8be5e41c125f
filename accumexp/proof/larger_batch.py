"""The larger batch: the whole of it in one piece, in one process, without a line of the window's code.

Its gradient comes from `torch.func.functional_call` and one `torch.autograd.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..accum.batch import Nested, batch_size
from .problem import Batch

Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class LargerBatch:
    """What one pass over the whole batch gave.

    Attributes:
        loss: its mean loss, shape ().
        gradient: by parameter name; zeros where the loss does not depend on a parameter.
        buffers: the model's, as the forward pass left them.
        outputs: of the model, detached.
    """

    loss: Tensor
    gradient: Gradient
    buffers: dict[str, Tensor]
    outputs: Any


def larger_batch(
    model: nn.Module,
    loss: Callable[..., Any],
    batch: Batch,
    autocast: torch.dtype | None = None,
    weight: float | Tensor | None = None,
    keep: Callable[[list[Tensor]], Any] | None = None,
    scale: float = 1.0,
) -> LargerBatch:
    """Loss and gradient of `loss(model(inputs), targets)` over all of `batch`; `model` stays as it is.

    With `weight` the loss is the sum of the items' losses divided by it, instead of their mean: a part's
    share in the larger batch's loss. `keep` is told the copies of parameters and buffers that are used.
    `scale` multiplies the loss before backward, and divides the gradient in fp64.
    """
    parameters = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in named(model)}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    if keep is not None:
        keep([*parameters.values(), *buffers.values()])
    inputs, targets = batch
    arguments, keywords = _arguments(inputs)
    device = next(iter(parameters.values())).device
    with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
        outputs = functional_call(model, (parameters, buffers), arguments, keywords)
        value = mean_loss(loss, outputs, targets)
        if weight is not None:
            value = value * (loss_weight(loss, targets) / weight)
    learned = {name: p for name, p in parameters.items() if p.requires_grad}
    found = torch.autograd.grad(value * scale, list(learned.values()), allow_unused=True)
    gradient = {
        name: torch.zeros_like(p) if g is None else g if scale == 1 else g.double() / scale
        for (name, p), g in zip(learned.items(), found, strict=True)
    }
    detached = outputs.detach() if isinstance(outputs, Tensor) else outputs
    return LargerBatch(value.detach(), gradient, {n: b.detach() for n, b in buffers.items()}, detached)


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The model's parameters, each once."""
    return list(model.named_parameters())


def mean_loss(loss: Callable[..., Any], outputs: Any, targets: Any) -> Tensor:
    """The loss of a whole batch, shape (): what `loss` says, or its sum over its weight."""
    if isinstance(outputs, Tensor) and outputs.dtype in (torch.float16, torch.bfloat16):
        outputs = outputs.float()
    if sums := getattr(loss, "total", None):
        return sums(outputs, targets) / loss.weight(targets)  # type: ignore[attr-defined]
    value = loss(outputs, targets)
    if value.dim() and isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return value.sum() / loss_weight(loss, targets)  # reduction="none" changes no mean's denominator
    return value.mean() if value.dim() else value


def loss_weight(loss: Callable[..., Any], targets: Any) -> float | Tensor:
    """What the mean of `loss` over `targets` is divided by: as the loss says, or items that count alike.

    Written from torch's documentation of CrossEntropyLoss and NLLLoss: with class indices the mean is
    over the targets that are not ignored, each with its class's weight.
    """
    if hasattr(loss, "total"):
        return loss.weight(targets)  # type: ignore[attr-defined]
    if getattr(loss, "reduction", None) == "sum":
        return 1.0  # nothing is divided
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and not targets.is_floating_point():
        counted = targets[targets != loss.ignore_index]
        return float(len(counted)) if loss.weight is None else loss.weight[counted].sum()
    return float(batch_size(targets))


def norm(gradient: Mapping[str, Tensor]) -> float:
    """The 2-norm of all of it."""
    return sum(float(g.double().square().sum()) for g in gradient.values()) ** 0.5


def clipped(gradient: Gradient, most: float | None) -> Gradient:
    """`gradient` scaled to a 2-norm of at most `most`, as torch.nn.utils.clip_grad_norm_ documents it."""
    if most is None:
        return gradient
    factor = min(1.0, most / (norm(gradient) + 1e-6))
    return {name: g * factor for name, g in gradient.items()}


def call(model: nn.Module, inputs: Nested) -> Any:
    arguments, keywords = _arguments(inputs)
    return model(*arguments, **keywords)


def _arguments(inputs: Nested) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), {}
