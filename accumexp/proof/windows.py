"""Single windows: ragged and weighted batches, buffers, activations, ranks, and a stop between two."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..accum.batch import batch_size, tensors
from ..accum.memory import measure_activations
from .certificate import Check
from .fixed_draws import drawing
from .float64 import computing
from .gradients import DOUBLE
from .larger_batch import call, larger_batch
from .observation import Observation, observe
from .problem import Batch, Problem, Start, cast, rows, whole
from .ranks import all_gather, ranks, worst
from .replay import BITS, SHARDED, states
from .rounding import narrowed


def ragged(problem: Problem, batch: Batch) -> list[tuple[str, Batch]]:
    """Last windows of an epoch, made of `batch`: short of samples, of a micro-batch, and of both.

    In one of them the last micro-batch has a single sample on each rank, if the model takes that.
    """
    size, micro = batch_size(batch), problem.micro_batch
    half = (micro + 1) // 2
    sizes = [size - micro, size - micro - half, size - half]
    if ranks() < micro and _takes(problem, rows(batch, slice(0, 1))):
        sizes.append(size - micro + ranks())
    return [
        (f"{left} of {size} samples", rows(batch, slice(0, left)))
        for left in dict.fromkeys(sizes)
        if 0 < left < size and left >= ranks()
    ]


def _takes(problem: Problem, batch: Batch) -> bool:
    """Whether the model can be trained on `batch`: a norm over samples cannot on a single one."""
    try:
        with torch.no_grad(), computing(DOUBLE), drawing(problem, problem.model, batch):
            call(narrowed(problem.model, DOUBLE), cast(batch, DOUBLE)[0])
    except (ValueError, RuntimeError):
        return False
    return True


def weighted(problem: Problem, batch: Batch) -> Batch | None:
    """`batch` with targets ignored unevenly over its micro-batches, or None where that is no question.

    A loss that could ignore targets is not enough: where a sample has one class, and no batch ignores any,
    a loop may well divide by the number of samples. Of a sample with several targets some are padding.
    """
    loss, targets = problem.loss, batch[1]
    if not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) or not isinstance(targets, Tensor):
        return None
    if targets.is_floating_point() or len(targets) < 3:
        return None
    some = targets.dim() > 1 or problem.ignores or any(_ignores(loss, t) for _, t in problem.batches)
    if not some:
        return None
    generator = torch.Generator().manual_seed(problem.seed)
    # From none of the first sample's to nearly all of the last one's.
    chance = torch.linspace(0, 0.95, len(targets)).view(-1, *[1] * (targets.dim() - 1))
    ignored = torch.rand(targets.shape, generator=generator) < chance
    return batch[0], targets.masked_fill(ignored.to(targets.device), loss.ignore_index)


def _ignores(loss: nn.CrossEntropyLoss | nn.NLLLoss, targets: Any) -> bool:
    return isinstance(targets, Tensor) and bool(targets.eq(loss.ignore_index).any())


def buffers_check(problem: Problem, start: Start, buffers: dict[str, Tensor]) -> Check | None:
    """The buffers that the loop's window left against those that the larger batch leaves."""
    if not buffers:
        return None
    mine = dict(start.inner.named_buffers())
    figures = {}
    for name, right in buffers.items():
        found = whole(mine[name])
        if torch.equal(found, right):
            figures[name] = 0.0  # a mask of infinities, too
        elif right.is_floating_point():
            size = float(right.double().norm()) or 1.0
            figures[name] = float((found.double() - right.double()).norm()) / size
        else:
            size = float(right.double().abs().sum()) or 1.0
            figures[name] = float((found.double() - right.double()).abs().sum()) / size
    name = max(figures, key=lambda key: figures[key] if figures[key] == figures[key] else math.inf)
    figure = worst(all_gather(figures[name]))
    bound = 8 * problem.samples * 2.0**-53
    return Check(
        "buffers",
        figure,
        bound,
        "relative",
        "fp64 rounding of statistics over the samples: 8 n u",
        f"worst at {name}" if figure else "no difference",
    )


def activations_check(problem: Problem, batch: Batch) -> Check | None:
    """What a window keeps for backward against one micro-batch's share of the larger batch's."""
    start = Start(problem, DOUBLE)
    observe(start, cast(batch, DOUBLE))  # a loop may measure its first window itself
    seen = observe(start, cast(batch, DOUBLE), measure=True)
    sizes = [size for size in seen.sizes if size]
    if not sizes or not seen.saved_bytes:
        return None
    model = narrowed(problem.model, DOUBLE)
    one = _kept(problem, model, rows(batch, slice(0, max(sizes))))
    every = _kept(problem, model, batch)
    found = max(all_gather(seen.saved_bytes / every))
    # The loop's copy of its targets is no activation either, but cannot be told from one.
    copied = sum(
        t.numel() * t.element_size() for t in tensors(cast(rows(batch, slice(0, max(sizes))), DOUBLE)[1])
    )
    alone = max(all_gather((one + copied) / every))
    return Check(
        "saved activations",
        found,
        1.5 * alone,
        "ratio",
        "a window keeps one micro-batch's graph; a second one alive would make it twice as much",
        f"of the larger batch's {every / 2**20:.2f} MiB in fp64; a micro-batch and its targets: {alone:.3g}",
    )


def _kept(problem: Problem, model: nn.Module, batch: Batch) -> int:
    batch = cast(batch, DOUBLE)
    with problem.loss_in(DOUBLE) as loss, computing(DOUBLE), drawing(problem, model, batch):
        with measure_activations(model, [*tensors(batch[0]), *tensors(batch[1])]) as saved:
            larger_batch(model, loss, batch, keep=saved.exclude)
    return saved.peak_bytes


def resume_check(problem: Problem, batches: list[Batch]) -> Check:
    """A window from saved state against the same window without the stop."""
    first, second = (cast(batch, DOUBLE) for batch in batches)
    undisturbed = Start(problem, DOUBLE)
    observe(undisturbed, first)
    state = copy.deepcopy(_state(undisturbed))
    observe(undisturbed, second)
    resumed = Start(problem, DOUBLE)
    resumed.inner.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    if resumed.schedule is not None:
        resumed.schedule.load_state_dict(state["schedule"])
    observe(resumed, second)
    one, other = undisturbed.inner.state_dict(), resumed.inner.state_dict()
    figures = [(_off(other[name], value), name) for name, value in one.items()]
    mine, theirs = states(undisturbed.optimizer), states(resumed.optimizer)
    same = mine.keys() == theirs.keys()
    figures += [(_off(theirs[key], value), f"optimizer {key}") for key, value in mine.items() if same]
    figure, name = max(figures)
    every = all_gather((figure if same else math.inf, name))
    figure, name = max(every)
    return Check(
        "resume",
        figure,
        SHARDED if ranks() > 1 else 0.0,
        "relative",
        "state saved between two windows and loaded again: " + BITS.partition(": ")[2],
        f"worst at {name}" if figure else "no difference after a window",
    )


def _state(start: Start) -> dict[str, Any]:
    schedule = None if start.schedule is None else start.schedule.state_dict()
    return {
        "model": start.inner.state_dict(),
        "optimizer": start.optimizer.state_dict(),
        "schedule": schedule,
    }


def _off(found: Any, right: Any) -> float:
    if not isinstance(right, Tensor):
        return 0.0 if found == right else math.inf
    found, right = whole(found).double(), whole(right).double()
    if torch.equal(found, right):
        return 0.0
    return float((found - right).norm()) / (float(right.norm()) or 1.0)


def agreement_check(seen: Observation) -> Check | None:
    """Whether all ranks gave their optimizers the same gradient."""
    if ranks() == 1:
        return None
    figure = math.inf
    if all(all_gather(seen.gradient is not None)):
        assert seen.gradient is not None
        flat = torch.cat([g.double().flatten() for g in seen.gradient.values()])
        low, high = flat.clone(), flat.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        figure = float((high - low).norm()) / (float(flat.norm()) or 1.0)
        figure = worst(all_gather(figure))
    return Check(
        "ranks agree",
        figure,
        0.0,
        "relative",
        "one gradient is reduced for all ranks: not a bit may differ between them",
        "no difference" if not figure else "gradients differ between ranks",
    )


class Reductions(TorchDispatchMode):
    """Active, counts the numbers that reducing collectives carry, whoever calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reduces = any(kind in func.__name__ for kind in ("allreduce", "all_reduce", "reduce_scatter"))
        if reduces and func.namespace in ("c10d", "_c10d_functional"):
            # Of a reduce-scatter's two buffers the larger one is sent.
            self.numbers += max(_elements(argument) for argument in args)
        return func(*args, **(kwargs or {}))


def collectives_check(problem: Problem, batch: Batch, most: int = 1) -> Check | None:
    """How often the gradient is reduced in a window, by the numbers that collectives carry."""
    if ranks() == 1:
        return None
    start = Start(problem, DOUBLE)
    observe(start, cast(batch, DOUBLE))  # wrappers set up their buffers in the first
    with Reductions() as reductions:
        observe(start, cast(batch, DOUBLE))
    numbers = sum(p.numel() for p in problem.model.parameters() if p.requires_grad)
    return Check(
        "gradient reductions a window",
        max(all_gather(reductions.numbers / numbers)),
        most + 0.5,
        "count",
        "the numbers that reducing collectives carry, over the parameters': each reduction adds 1",
        f"{problem.steps} micro-batches on each of {ranks()} ranks",
    )


def _elements(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel()
    return sum(map(_elements, argument)) if isinstance(argument, tuple | list) else 0
