"""Bounds of the rounding by which two correct gradients may differ, derived from the larger batch itself.

docs/proof.md derives them. In fp64, another order of the same operations is further than lambda = 8 standard
deviations away with probability 2 exp(-lambda^2 / 2) = 2.5e-14 (Higham and Mary, SIAM J. Sci. Comput. 41,
2019), and adding n terms in any order loses n u of their size (Higham, Accuracy and Stability of Numerical
Algorithms, 2nd ed., 4.2). In the run's precision all `WINDOWS` distances from fp64 are larger than all
`LARGER_BATCHES` of the larger batch with probability 1 / C(WINDOWS + LARGER_BATCHES, WINDOWS) = 1 / 116,280
for each parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    whole_batch_pass,
)
from .nested import batch_size, samples_first
from .problem import Problem, WholeBatch, cast, copy_in, copy_of, rows

LAMBDA = 8.0
# Below this number of elements fp32 may lose nothing by chance: the bound is what the whole gradient loses.
FEW = 32
WINDOWS = 7
LARGER_BATCHES = 14
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
    """

    larger: LargerBatch
    gradient: Gradient
    size: float
    bounds: dict[str, float]
    loss_bound: float

    @property
    def loss(self) -> float:
        return float(self.larger.loss)


def expected_update(
    problem: Problem, batch: WholeBatch, model: nn.Module, clip_norm: float | None = None
) -> ExpectedUpdate:
    """The larger batch's update on `batch` from the weights of `model`, which is in fp64."""
    exact = larger_batch_of(problem, model, batch)
    with _without_tf32(problem.device):
        coarse = larger_batch_of(problem, copy_in(model, torch.float32), batch)
    size = norm(exact.gradient)
    samples = batch_size(batch)
    factor = clip_factor(size, clip_norm)
    losses = {name: float((coarse.gradient[name].double() - g).norm()) for name, g in exact.gradient.items()}
    whole_loss = math.hypot(*losses.values())
    clip = clipping_error(clip_norm, exact.gradient, DOUBLE)
    bounds = {}
    for name, g in exact.gradient.items():
        lost = whole_loss if g.numel() < FEW else losses[name]
        bounds[name] = factor * (LAMBDA * 2.0**-29 * lost + (samples * U64 + clip) * size)
    if factor < 1:
        # The clipping norm's relative error is at most the gradient's, and scales every parameter's part.
        off = math.hypot(*bounds.values()) / size
        bounds = {name: b + off * float(exact.gradient[name].norm()) for name, b in bounds.items()}
    expected = clamped(clipped(exact.gradient, clip_norm), problem.clip_value)
    loss = float(exact.loss)
    lost = abs(float(coarse.loss.double()) - loss)
    loss_bound = LAMBDA * 2.0**-29 * lost + samples * U64 * max(abs(loss), U64)
    return ExpectedUpdate(exact, expected, size, bounds, loss_bound)


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
    with problem.loss_in(dtype) as loss, keep_float64(dtype), seeded_draws(problem, model, batch, numbers):
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
) -> tuple[Gradient, float]:
    """(the gradient that samples `numbers` of `batch` add to the larger batch's, their weight)."""
    with prepared_pass(problem, model, batch) as (model, loss, batch):
        weight = loss_weight(loss, batch)
        part = rows(batch, torch.tensor(numbers, device=problem.device))
        gradient = whole_batch_pass(model, loss, part, autocast, weight, scale=scale).gradient
        part_weight = float(loss_weight(loss, part))
    if not part_weight:  # its mean is nan, but it adds nothing to the sum
        gradient = {name: torch.zeros_like(g) for name, g in gradient.items()}
    return gradient, part_weight


def shuffled(batch: WholeBatch, seed: int) -> tuple[WholeBatch, list[int]]:
    """The samples of `batch` in another order, and their numbers."""
    first = samples_first(batch[0])[0]
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
    return rows(batch, order.to(first.device)), order.tolist()
