"""The larger batch: the whole batch in one forward and backward pass, independent of the window's code.

Its gradient comes from one ordinary forward pass and one `backward()` of a copy of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .loss_terms import Term, by_terms, couples, declares_terms, read_terms, sum_of
from .nested import batch_size, cloned, map_tensors, tensors
from .problem import WholeBatch, copy_of, unsharded

Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class LargerBatch:
    """The result of one pass over the whole batch.

    Attributes:
        loss: its mean loss, shape ().
        gradient: by parameter name; zeros where the loss does not depend on a parameter.
        buffers: the model's buffers after the forward pass.
        outputs: the model's outputs, detached.
        terms: each term's part of the loss by name, shape (); empty for a loss of one term.
    """

    loss: Tensor
    gradient: Gradient
    buffers: dict[str, Tensor]
    outputs: Any
    terms: dict[str, Tensor]


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
        on_copies: called with the copies of parameters, buffers and batch that the pass uses.
        scale: multiplies the loss before backward, and divides the gradient in fp64.
    """
    return whole_batch_pass(copy_of(model), loss, batch, autocast, weight, on_copies, scale)


def whole_batch_pass(
    model: nn.Module,
    loss: Callable[..., Any],
    batch: WholeBatch,
    autocast: torch.dtype | None = None,
    weight: float | Tensor | None = None,
    on_copies: Callable[[list[Tensor]], Any] | None = None,
    scale: float = 1.0,
) -> LargerBatch:
    """As `larger_batch`, but the pass changes the buffers and gradients of `model`."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.grad = None
    inputs, targets = cloned(batch)  # a model may write into its inputs, or differentiate by them
    if on_copies is not None:
        on_copies([*model.parameters(), *model.buffers(), *tensors([inputs, targets])])
    with (
        nullcontext() if autocast is None else torch.autocast(next(model.parameters()).device.type, autocast)
    ):
        outputs = call(model, inputs)
        value, terms = loss_and_terms(loss, outputs, targets)
        if weight is not None:
            value = value * (loss_weight(loss, targets, batch_size(batch)) / weight)
    # An ordinary backward: reentrant checkpoints know no other.
    with _restored_gradients(value, set(parameters.values())):
        (value * scale).backward()
    gradient = {}
    for name, p in parameters.items():
        # A copy: a recorded graph may write its next gradient into the same memory.
        g = dense(torch.zeros_like(p) if p.grad is None else p.grad).detach().clone()
        gradient[name] = g if scale == 1 else g.double() / scale
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
    values = {name: term.value.detach() for name, term in terms.items()}
    return LargerBatch(value.detach(), gradient, buffers, map_tensors(Tensor.detach, outputs), values)


@contextmanager
def _restored_gradients(value: Tensor, except_for: set[nn.Parameter]) -> Iterator[None]:
    """Restores the `.grad` of what `value` depends on beside the parameters: weights of the loss itself."""
    nodes, seen, others = [value.grad_fn], set(), []
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of a leaf
        if isinstance(variable, Tensor) and variable not in except_for:
            others.append((variable, variable.grad))
            variable.grad = None
        nodes.extend(following for following, _ in node.next_functions)
    try:
        yield
    finally:
        for variable, gradient in others:
            variable.grad = gradient


def dense(tensor: Tensor) -> Tensor:
    """`tensor`, which may be sparse or complex, as a dense real one; complex elements become pairs."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def mean_loss(loss: Callable[..., Any], outputs: Any, targets: Any) -> Tensor:
    """The mean loss of a batch, shape (): the value of `loss`, or its `total` over its `weight`."""
    return loss_and_terms(loss, outputs, targets)[0]


def loss_and_terms(loss: Callable[..., Any], outputs: Any, targets: Any) -> tuple[Tensor, dict[str, Term]]:
    """(the mean loss of a batch, shape (); its terms by name, none for a loss of one term)."""
    outputs = widened(outputs)
    value = _value(loss, outputs, targets)
    terms = read_terms(value)
    return (sum_of(terms), terms) if terms else (_mean(loss, value, targets), {})


def widened(outputs: Any) -> Any:
    """`outputs` in fp32 if they are a tensor of fp16 or bf16: sums over items need more bits."""
    narrow = isinstance(outputs, Tensor) and outputs.dtype in (torch.float16, torch.bfloat16)
    return outputs.float() if narrow else outputs


def _value(loss: Any, outputs: Any, targets: Any) -> Any:
    if hasattr(loss, "total") and not couples(loss) and not declares_terms(loss):
        return loss.total(outputs, targets) / loss.weight(targets)
    return by_terms(loss)(outputs, targets)


def _mean(loss: Any, value: Tensor, targets: Any) -> Tensor:
    if not value.dim():
        return value
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and not targets.is_floating_point():
        return value.sum() / _class_weight(loss, targets)  # reduction="none"
    return value.mean()


def loss_weight(loss: Callable[..., Any], targets: Any, samples: int | None = None) -> float | Tensor:
    """The denominator of the mean of `loss` over `targets`: `loss.weight(targets)`, or the number of items.

    With class indices the mean is over the targets that are not ignored, each with its class's weight
    (torch.nn.CrossEntropyLoss). `samples` is their number, needed where the targets are None. A loss of
    several terms, or one that couples samples, has no denominator of its own: it is given that of a mean.
    """
    if couples(loss) or declares_terms(loss):
        return float(batch_size(targets) if samples is None else samples)
    if hasattr(loss, "total"):
        return loss.weight(targets)  # type: ignore[attr-defined]
    if getattr(loss, "reduction", None) == "sum":
        return 1.0
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and not targets.is_floating_point():
        return _class_weight(loss, targets)
    return float(batch_size(targets) if samples is None else samples)


def _class_weight(loss: nn.CrossEntropyLoss | nn.NLLLoss, targets: Tensor) -> float | Tensor:
    counted = targets[targets != loss.ignore_index]
    return float(len(counted)) if loss.weight is None else loss.weight[counted].sum()


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


def unclamped(gradient: Gradient, clip_value: float | None) -> Gradient:
    """`gradient` with zeros where it may have been clamped: what is left shows the factor before that."""
    if clip_value is None:
        return gradient
    return {name: g.where(g.abs() < 0.99 * clip_value, 0.0) for name, g in gradient.items()}


def call(model: nn.Module, inputs: Any) -> Any:
    """`model` on `inputs`: a mapping as keywords, a tuple or list as positional arguments, else as one."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
