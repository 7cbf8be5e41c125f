"""The windows that a proof tries beside a whole one: smaller ones, and one with ignored targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..accum.batch import steps_for
from .fixed_draws import seeded_draws
from .float64 import DOUBLE, keep_float64
from .larger_batch import call
from .nested import batch_size, cloned
from .problem import Problem, WholeBatch, cast, copy_in, is_large, rows
from .ranks import world_size


def ragged(problem: Problem, batch: WholeBatch) -> list[tuple[str, WholeBatch]]:
    """Last windows of an epoch, made of `batch`: short of samples, of a micro-batch, and of both.

    In one of them the last micro-batch has a single sample on each rank, if the model accepts that. If not (a
    norm over samples), no window has a micro-batch of one.
    """
    size = batch_size(batch)
    micro = -(-problem.samples // problem.steps)  # samples of a micro-batch, over all ranks
    half = (micro + 1) // 2
    sizes = [size - micro, size - micro - half, size - half, size - 1 - size % 2, half, 2]
    single = size - micro + world_size()
    if is_large(problem.model):  # the same kinds of window, in fewer micro-batches
        sizes = [2 * micro, micro + half + (micro + half + 1) % 2, half, 2]
        single = micro + world_size()
    if not _accepts(problem, rows(batch, slice(0, 1))):
        sizes = [left for left in sizes if _smallest_share(problem, left, micro) > 1]
    elif world_size() < micro:
        sizes.append(single)
    return [
        (f"{left} of {size} samples", rows(batch, slice(0, left)))
        for left in dict.fromkeys(sizes)
        if 0 < left < size and left >= world_size()
    ]


def _smallest_share(problem: Problem, left: int, micro: int) -> int:
    """Samples of a rank in the smallest micro-batch of a window of `left`, split evenly or not."""
    even = left // steps_for(left, problem.samples, problem.steps)
    return min(left % micro or micro, even) // world_size()


def _accepts(problem: Problem, batch: WholeBatch) -> bool:
    """Whether a forward pass on `batch` works: norms over samples reject a single one."""
    try:
        model = copy_in(problem.model, DOUBLE)
        with keep_float64(DOUBLE), seeded_draws(problem, model, batch):
            call(model, cloned(cast(batch, DOUBLE)[0]))
    except Exception:  # the model's own refusal, whatever its class
        return False
    return True


def weighted(problem: Problem, batch: WholeBatch) -> WholeBatch | None:
    """`batch` with targets ignored unevenly over its micro-batches; None where a loop need not handle it.

    If a sample has one class, and no batch ignores any, a loop may divide by the number of samples. A sample
    with several targets may have padding.
    """
    loss, targets = problem.loss, batch[1]
    if not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or not isinstance(targets, Tensor):
        return None
    if targets.is_floating_point() or len(targets) < 3:
        return None
    in_batches = (
        isinstance(each, Tensor) and bool(each.eq(loss.ignore_index).any()) for _, each in problem.batches
    )
    if targets.dim() == 1 and not problem.try_ignored_targets and not any(in_batches):
        return None
    generator = torch.Generator().manual_seed(problem.seed)
    # From none of the first sample's to nearly all of the last one's.
    probability = torch.linspace(0, 0.95, len(targets)).view(-1, *[1] * (targets.dim() - 1))
    ignored = torch.rand(targets.shape, generator=generator) < probability
    return batch[0], targets.masked_fill(ignored.to(targets.device), loss.ignore_index)
