"""How far two right gradients may lie apart by rounding alone, derived from the larger batch itself.

In fp64. What a pass over the larger batch loses to rounding is proportional to the unit roundoff u, so
fp64 loses 2^-29 of what fp32 loses on the same numbers, which is measured. Rounding errors of many
operations behave like independent random numbers, so that another order of the same operations lies
further than lambda = 8 of their standard deviations away with probability 2 exp(-lambda^2 / 2), which is
2.5e-14 (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput.
41, 2019). To it comes the worst case of adding n terms in any order, n u times their size (Higham,
Accuracy and Stability of Numerical Algorithms, 2nd ed., 4.2). A gradient that is clipped carries the
rounding of its norm as well, lambda sqrt(P) u of it with P parameters.

In the run's precision single roundings may switch a ReLU, and with it the gradient, by much more than u.
How often is a matter of the model, so nothing is assumed of it: the window's distance from the fp64
gradient on several batches is held against the larger batch's own on the same batches. Two samples of one
distribution: that all `WINDOWS` of the first are larger than all `LARGER` of the second has a
probability of 1 / C(WINDOWS + LARGER, WINDOWS), one in 116,280 for each parameter. What the window's
micro-batches lose by themselves, each held against its own fp64 gradient, is added: by the triangle
inequality their sum cannot lose more, however few samples there are to tell distributions from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..accum.batch import tensors
from .fixed_draws import drawing
from .float64 import computing
from .larger_batch import Gradient, LargerBatch, clipped, larger_batch, loss_weight, norm
from .problem import Batch, Problem, cast, rows

LAMBDA = 8.0
# A parameter of fewer numbers may be rounded with luck once: it is held to what the whole gradient loses.
FEW = 32
WINDOWS = 7
LARGER = 14
SMALLEST = 2.0**-20  # of a loss scale
U32 = 2.0**-24
U64 = 2.0**-53
ROUNDING = "fp64 rounding: 8 times 2^-29 of what fp32 loses on the larger batch, and n u for adding n samples"


@dataclass(frozen=True)
class Expected:
    """The larger batch's update in fp64, and how far from it rounding alone can lead.

    Attributes:
        gradient: after clipping, by parameter name.
        size: its 2-norm before clipping.
        bound: of the error's 2-norm, by parameter name.
        loss_bound: of the loss's error.
    """

    larger: LargerBatch
    gradient: Gradient
    size: float
    bound: dict[str, float]
    loss_bound: float

    @property
    def loss(self) -> float:
        return float(self.larger.loss)


def expected(problem: Problem, batch: Batch, model: nn.Module, clip_norm: float | None = None) -> Expected:
    """The larger batch's update on `batch` from the weights of `model`, which is in fp64."""
    exact = in_precision(problem, model, batch, torch.float64)
    with without_tf32(problem.device):
        coarse = in_precision(problem, narrowed(model), batch, torch.float32)
    size = norm(exact.gradient)
    samples = len(_first(batch))
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (size + 1e-6))
    lost = {name: float((coarse.gradient[name].double() - g).norm()) for name, g in exact.gradient.items()}
    everything = math.hypot(*lost.values())
    lost = {name: everything if exact.gradient[name].numel() < FEW else error for name, error in lost.items()}
    clip = clipping(clip_norm, exact.gradient, torch.float64)
    bound = {
        name: factor * (LAMBDA * 2.0**-29 * error + (samples * U64 + clip) * size)
        for name, error in lost.items()
    }
    if factor < 1:
        # The norm that clips is off by no more than the gradient is, and with it every part.
        off = math.hypot(*bound.values()) / size
        bound = {name: b + off * float(exact.gradient[name].norm()) for name, b in bound.items()}
    loss = float(exact.loss)
    lost_loss = abs(float(coarse.loss.double()) - loss)
    loss_bound = LAMBDA * 2.0**-29 * lost_loss + samples * U64 * max(abs(loss), U64)
    return Expected(exact, clipped(exact.gradient, clip_norm), size, bound, loss_bound)


def clipping(clip_norm: float | None, gradient: Gradient, dtype: torch.dtype) -> float:
    """How much clipping `gradient` in `dtype` may round, relative to it.

    torch.nn.utils.clip_grad_norm_ rounds the norm of each parameter's, the norm of those, its sum with 1e-6,
    the quotient and every product. A sum of d squares comes to it, of which the root halves the error: in
    fp64 one after the other, with lambda = 8 as above, and for narrower ones at least in fp32 and in pairs.
    """
    if clip_norm is None or norm(gradient) <= clip_norm * (1 - 1e-2):
        return 0.0
    count = max(2, sum(g.numel() for g in gradient.values()))
    added = LAMBDA * math.sqrt(count) * U64 if dtype is torch.float64 else math.log2(count) * U32
    return 5 * roundoff(dtype) + added / 2


@contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Inside, fp32 is fp32 on a GPU too: TF32 would lose 2^13 times more and widen the bound as much."""
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
    """The relative error of rounding a number to `dtype`, at most."""
    return torch.finfo(dtype).eps / 2


def in_precision(
    problem: Problem,
    model: nn.Module,
    batch: Batch,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    numbers: Sequence[int] | None = None,
    scale: float = 1.0,
) -> LargerBatch:
    """The larger batch in `dtype`, in which `model` has to be; draws as in every window of the proof.

    `numbers` names the samples where they are not in the order in which windows have them. `scale` is the
    loss scale of fp16.
    """
    with problem.loss_in(torch.promote_types(dtype, torch.float32)) as loss:
        given = cast(batch, dtype)
        with computing(dtype), drawing(problem, model, given, numbers):
            return larger_batch(model, loss, given, autocast, scale=scale)


def rough_in_precision(
    problem: Problem, model: nn.Module, batch: Batch, scale: float, numbers: Sequence[int] | None = None
) -> LargerBatch:
    """The larger batch in the run's precision, at `scale` or, where all of it overflows, a smaller one."""
    while True:
        found = in_precision(problem, model, batch, problem.dtype, problem.autocast, numbers, scale)
        finite = all(bool(g.isfinite().all()) for g in found.gradient.values())
        if finite or problem.scaling is None or scale < SMALLEST:
            return found
        scale /= 16


def part_in_precision(
    problem: Problem,
    model: nn.Module,
    batch: Batch,
    ids: Sequence[int],
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    scale: float = 1.0,
) -> tuple[Gradient, float]:
    """(the gradient that samples `ids` of `batch` add to the larger batch's, what they weigh)."""
    with problem.loss_in(torch.promote_types(dtype, torch.float32)) as loss:
        given = cast(batch, dtype)
        weight = loss_weight(loss, given[1])
        part = rows(given, torch.tensor(ids, device=problem.device))
        with computing(dtype), drawing(problem, model, given):
            found = larger_batch(model, loss, part, autocast, weight=weight, scale=scale).gradient
        items = float(loss_weight(loss, part[1]))
    if not items:  # the mean of nothing is nan; nothing adds nothing
        found = {name: torch.zeros_like(g) for name, g in found.items()}
    return found, items


def narrowed(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of `model` in `dtype`."""
    return copy.deepcopy(model).to(dtype)


def shuffled(batch: Batch, seed: int) -> tuple[Batch, list[int]]:
    """The samples of `batch` in another order, and which they are."""
    size = len(_first(batch))
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return rows(batch, order.to(_first(batch).device)), order.tolist()


def _first(batch: Batch) -> torch.Tensor:
    return tensors(batch[0])[0]
