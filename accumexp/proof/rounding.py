"""Bounds of the rounding by which two correct gradients may differ, derived from the larger batch itself.

docs/proof.md derives them. In fp64, another order of the same operations is further than lambda = 8 standard
deviations away with probability 2 exp(-lambda^2 / 2) = 2.5e-14 (Higham and Mary, SIAM J. Sci. Comput. 41,
2019), and adding n terms in any order loses n u of their size (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., 4.2).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .fixed_draws import seeded_draws
from .float64 import DOUBLE, keep_float64
from .larger_batch import (
    Gradient,
    LargerBatch,
    clamped,
    clip_factor,
    clipped,
    loss_weight,
    norm,
    relative_error,
    whole_batch_pass,
)
from .nested import batch_size, samples_first
from .problem import Problem, WholeBatch, cast, copy_in, copy_of, rows

LAMBDA = 8.0
# Below this number of elements fp32 may lose nothing by chance: the bound is what the whole gradient loses.
FEW = 32
# In windows of fewer samples than this, few roundings make up all of the error, and fp32 may lose little by
# chance: it is measured several times, so often that the windows have as many samples together.
SAMPLES = 8
# The key of the whole gradient beside those of the parameters.
WHOLE = "all of it"
SMALLEST_SCALE = 2.0**-20
# Unit roundoffs of fp32 and fp64.
U32 = 2.0**-24
U64 = 2.0**-53
ROUNDING = "fp64 rounding: 8 times 2^-29 of what fp32 loses on the larger batch, and n u for adding n samples"


@dataclass(frozen=True)
class ExpectedUpdate:
    """The larger batch's update in fp64, and bounds of the rounding errors.

    Attributes:
        gradient: after clipping, by parameter name.
        size: its 2-norm before clipping.
        bounds: of the error's 2-norm, by parameter name.
        loss_bound: of the loss's error.
        buffer_bounds: of the relative error of what the forward pass leaves in a buffer, by name.
    """

    larger: LargerBatch
    gradient: Gradient
    size: float
    bounds: dict[str, float]
    loss_bound: float
    buffer_bounds: dict[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        return float(self.larger.loss)


def expected_update(
    problem: Problem, batch: WholeBatch, model: nn.Module, clip_norm: float | None = None
) -> ExpectedUpdate:
    """The larger batch's update on `batch` from the weights of `model`, which is in fp64."""
    exact = larger_batch_of(problem, perturbed_model(problem, model, batch), batch)
    with _without_tf32(problem.device):
        coarse_model = copy_in(model, torch.float32)
        coarse = larger_batch_of(problem, perturbed_model(problem, coarse_model, batch), batch)
        others = _rounded_otherwise(problem, model, batch)
    samples = batch_size(batch)
    gradient = transformed(problem, model, exact.gradient)
    lost = norms_of_errors(coarse.gradient, exact.gradient)
    grown = growth(problem, coarse_model, coarse.gradient, exact.gradient, gradient, lost)
    for other in others:
        errors = norms_of_errors(other.gradient, exact.gradient)
        lost = {name: max(error, errors[name]) for name, error in lost.items()}
    added = samples * U64 * max(norm(exact.gradient), norm(gradient))
    bounds = {
        name: grown[name] * (LAMBDA * 2.0**-29 * lost[WHOLE if g.numel() < FEW else name] + added)
        for name, g in gradient.items()
    }
    bounds = clipped_bounds(bounds, gradient, clip_norm, DOUBLE)
    size = norm(gradient)
    expected = clamped(clipped(gradient, clip_norm), problem.clip_value)
    loss = float(exact.loss)
    loss_lost = max(abs(float(each.loss.double()) - loss) for each in (coarse, *others))
    loss_bound = LAMBDA * 2.0**-29 * loss_lost + samples * U64 * max(abs(loss), U64)
    buffer_bounds = {
        name: LAMBDA * (2.0**-29 * relative_error(coarse.buffers[name], buffer) + problem.samples * U64)
        for name, buffer in exact.buffers.items()
    }
    return ExpectedUpdate(exact, expected, size, bounds, loss_bound, buffer_bounds)


def _rounded_otherwise(problem: Problem, model: nn.Module, batch: WholeBatch) -> list[LargerBatch]:
    """A small batch in fp32, from weights that are rounded at random; nothing for `SAMPLES` and more."""
    others = []
    for seed in range(1, math.ceil(SAMPLES / batch_size(batch))):
        generator = torch.Generator(problem.device).manual_seed(seed)
        copied = copy_of(model)
        with torch.no_grad():
            for p in copied.parameters():
                noise = torch.rand(p.shape, generator=generator, device=p.device, dtype=DOUBLE)
                p.mul_(1 + U32 * (2 * noise - 1))
        copied = copy_in(copied, torch.float32)
        others.append(larger_batch_of(problem, perturbed_model(problem, copied, batch), batch))
    return others


def clipped_bounds(
    bounds: dict[str, float], gradient: Gradient, clip_norm: float | None, dtype: torch.dtype
) -> dict[str, float]:
    """The bounds of the errors, by parameter, of `gradient` after it is clipped in `dtype`."""
    size = norm(gradient)
    factor = clip_factor(size, clip_norm)
    clip = clipping_error(clip_norm, gradient, dtype)
    # The clipping norm's relative error is at most the gradient's, and scales every parameter's part.
    off = clip + (math.hypot(*bounds.values()) / size if factor < 1 else 0.0)
    return {name: factor * (bound + off * float(gradient[name].norm())) for name, bound in bounds.items()}


def perturbed_model(
    problem: Problem, model: nn.Module, batch: WholeBatch, autocast: torch.dtype | None = None
) -> nn.Module:
    """`model`, or a copy that `Problem.perturb` has perturbed by the larger batch's gradient."""
    if problem.perturb is None:
        return model
    gradient = larger_batch_of(problem, model, batch, autocast).gradient
    copied = with_gradient(model, gradient)
    with torch.no_grad():
        problem.perturb(copied)
    copied.zero_grad()
    return copied


def transformed(problem: Problem, model: nn.Module, gradient: Gradient) -> Gradient:
    """What `Problem.transform_gradient` makes of `gradient`, at the weights of `model`."""
    if problem.transform_gradient is None:
        return gradient
    copied = with_gradient(model, gradient)
    problem.transform_gradient(copied)
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach()
        for name, p in copied.named_parameters()
        if name in gradient
    }


def growth(
    problem: Problem,
    model: nn.Module,
    inexact: Gradient,
    exact: Gradient,
    expected: Gradient,
    lost: Mapping[str, float],
) -> dict[str, float]:
    """By what `Problem.transform_gradient` multiplies rounding errors, by parameter; at least 1.

    Measured on an `inexact` gradient and its errors, `lost`, at the weights of `model`.
    """
    if problem.transform_gradient is None:
        return dict.fromkeys(exact, 1.0)
    errors = norms_of_errors(transformed(problem, model, inexact), expected)
    return {
        name: max(
            1.0,
            errors[name] / lost[name] if lost[name] else 1.0,
            float(expected[name].norm()) / (float(g.norm()) or 1.0),
        )
        for name, g in exact.items()
    }


def with_gradient(model: nn.Module, gradient: Gradient) -> nn.Module:
    """A copy of `model` with `gradient` in `.grad`."""
    copied = copy.deepcopy(model)
    for name, parameter in copied.named_parameters():
        parameter.grad = gradient[name].to(parameter.dtype).clone() if name in gradient else None
    return copied


def norms_of_errors(gradient: Gradient, expected: Gradient) -> dict[str, float]:
    """The 2-norm of each parameter's error, and under `WHOLE` that of the whole error."""
    errors = {name: float((gradient[name].double() - g.double()).norm()) for name, g in expected.items()}
    return {**errors, WHOLE: math.sqrt(sum(error * error for error in errors.values()))}


def clipping_error(clip_norm: float | None, gradient: Gradient, dtype: torch.dtype) -> float:
    """A bound of the relative rounding error of clipping `gradient` in `dtype`; 0 if it is not clipped.

    torch.nn.utils.clip_grad_norm_ rounds each parameter's norm, the norm of those norms, its sum with 1e-6,
    the quotient and every product: 5 u. Each norm is the root of a sum of squares, and the root halves the
    sum's error: lambda sqrt(d) u in fp64, which adds one after the other; log2(d) u of fp32 for narrower
    dtypes, which are added pairwise in fp32 at least.
    """
    if clip_norm is None or norm(gradient) <= clip_norm * (1 - 1e-2):
        return 0.0
    count = max(2, sum(g.numel() for g in gradient.values()))
    added = LAMBDA * math.sqrt(count) * U64 if dtype is DOUBLE else math.log2(count) * U32
    return 5 * roundoff(dtype) + added / 2


@contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    """Disables TF32 on a GPU: it loses 2^13 times more than fp32 and would widen the bound as much."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def roundoff(dtype: torch.dtype) -> float:
    """The unit roundoff: a bound of the relative error of rounding a number to `dtype`."""
    return torch.finfo(dtype).eps / 2


def larger_batch_of(
    problem: Problem,
    model: nn.Module,
    batch: WholeBatch,
    autocast: torch.dtype | None = None,
    numbers: Sequence[int] | None = None,
    scale: float = 1.0,
) -> LargerBatch:
    """The larger batch in the dtype of `model`, at loss scale `scale`, with the proof's random draws.

    `numbers` are those of the samples, if their order is not that of the windows.
    """
    with prepared_pass(problem, model, batch, numbers) as (model, loss, batch):
        return whole_batch_pass(model, loss, batch, autocast, scale=scale)


@contextmanager
def prepared_pass(
    problem: Problem, model: nn.Module, batch: WholeBatch, numbers: Sequence[int] | None = None
) -> Iterator[tuple[nn.Module, Callable[..., Any], WholeBatch]]:
    """A copy of `model`, the loss and `batch` in its dtype, with the proof's random draws meanwhile."""
    model = copy_of(model)
    dtype = next(p.dtype.to_real() for p in model.parameters() if p.is_floating_point() or p.is_complex())
    batch = cast(batch, dtype)
    with ExitStack() as stack:
        loss = stack.enter_context(problem.loss_in(dtype))
        stack.enter_context(problem.outside_as(problem.outside(dtype)))
        stack.enter_context(keep_float64(dtype, problem.narrowing))
        stack.enter_context(seeded_draws(problem, model, batch, numbers))
        yield model, loss, batch


def scaled_larger_batch(
    problem: Problem, model: nn.Module, batch: WholeBatch, scale: float, numbers: Sequence[int] | None = None
) -> LargerBatch:
    """The larger batch as the run computes it, at the largest loss scale up to `scale` without overflow."""
    while True:
        larger = larger_batch_of(problem, model, batch, problem.autocast, numbers, scale)
        finite = all(bool(g.isfinite().all()) for g in larger.gradient.values())
        if finite or problem.scaling is None or scale < SMALLEST_SCALE:
            return larger
        scale /= 16


def part_gradient(
    problem: Problem,
    model: nn.Module,
    batch: WholeBatch,
    numbers: Sequence[int],
    autocast: torch.dtype | None = None,
    scale: float = 1.0,
    share: Callable[..., torch.Tensor] | None = None,
) -> tuple[Gradient, float]:
    """(the gradient that samples `numbers` of `batch` add to the larger batch's, their weight).

    Args:
        share: a loss of their outputs and targets whose gradient that is, see `loss_shares.py`.
    """
    with prepared_pass(problem, model, batch) as (model, loss, batch):
        samples = batch_size(batch)
        weight = loss_weight(loss, batch[1], samples)
        part = rows(batch, torch.tensor(numbers, device=problem.device))
        if share is not None:
            gradient = whole_batch_pass(model, share, part, autocast, scale=scale).gradient
            return gradient, float(len(numbers))
        gradient = whole_batch_pass(model, loss, part, autocast, weight, scale=scale).gradient
        part_weight = float(loss_weight(loss, part[1], len(numbers)))
    if not part_weight:  # its mean is nan, but it adds nothing to the sum
        gradient = {name: torch.zeros_like(g) for name, g in gradient.items()}
    return gradient, part_weight


def shuffled(batch: WholeBatch, seed: int) -> tuple[WholeBatch, list[int]]:
    """The samples of `batch` in another order, and their numbers."""
    first = samples_first(batch[0])[0]
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
    return rows(batch, order.to(first.device)), order.tolist()
