"""A loss scale under overflow: infinities put into one micro-batch after the other."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..accum.batch import tensors
from .certificate import Check
from .gradients import DOUBLE, first_update
from .larger_batch import Gradient, norm
from .observation import Observation, observe
from .problem import Batch, Problem, Start, cast, whole
from .ranks import all_gather, rank, ranks
from .replay import states
from .rounding import in_precision, narrowed


def overflow_checks(problem: Problem, batch: Batch) -> list[Check]:
    """An overflow in each micro-batch of each rank alone, and in all at once, in the run's precision."""
    if problem.scaling is None:
        return []
    given = cast(batch, problem.dtype)
    count = max(all_gather(len(first_update(Start(problem, problem.dtype), given).sizes)))
    places = [(r, {k}) for r in range(ranks()) for k in range(count)]
    kept, moved = [], []
    for who, numbers in [*places, (None, set(range(count)))]:
        where = "every micro-batch" if who is None else f"micro-batch {min(numbers)}" + _of(who)
        changed, ratio = _window(problem, given, who, numbers)
        kept.append((changed, where))
        off = abs(math.log(max(ratio, 1e-300)) - math.log(problem.scaling.backoff_factor))
        moved.append((off, where, ratio))
    changed, where = max(all_gather(max(kept)))
    off, place, ratio = max(max(every) for every in all_gather(moved))
    return [
        Check(
            "overflow in each micro-batch",
            changed,
            0.0,
            "count",
            "a window that overflows changes no weight and no optimizer state",
            f"something changed after {where}" if changed else f"{len(places)} places and all at once",
        ),
        Check(
            "loss scale after an overflow",
            off,
            0.1,
            "log ratio",
            "it moves once a window, whatever overflowed; measured by the next window's gradient in "
            f"{_name(problem)}, so within 10 %",
            f"times {ratio:.3g} after {place}, {problem.scaling.backoff_factor:g} is right",
        ),
    ]


def _of(who: int) -> str:
    return f" of rank {who}" if ranks() > 1 else ""


def _name(problem: Problem) -> str:
    return str(problem.autocast or problem.dtype).removeprefix("torch.")


def _window(problem: Problem, batch: Batch, who: int | None, numbers: Collection[int]) -> tuple[float, float]:
    """(what an overflow in `numbers` of rank `who` changed, the factor by which the scale moved)."""
    start = Start(problem, problem.dtype)
    exact = _exact(problem, start, batch)
    before = _scale(first_update(start, batch, arrivals=True), exact)
    weights = {name: p.detach().clone() for name, p in start.parameters().items()}
    state = copy.deepcopy(states(start.optimizer))
    with _overflowing(start, numbers if who in (None, rank()) else ()):
        observe(start, batch)
    changed = sum(_differs(p.detach(), weights[name]) for name, p in start.parameters().items())
    after = states(start.optimizer)
    changed += sum(_differs(value, state[key]) for key, value in after.items() if key in state)
    # A fused optimizer that is told to skip may make its state, of zeros.
    changed += sum(bool(whole(after[key]).any()) for key in after.keys() - state.keys())
    exact = _exact(problem, start, batch)
    return float(changed), _scale(observe(start, batch, arrivals=True), exact) / before


def _exact(problem: Problem, start: Start, batch: Batch) -> Gradient:
    """The fp64 gradient of the larger batch at the weights that `start` has now."""
    model = narrowed(problem.model, DOUBLE)
    with torch.no_grad():
        mine = start.parameters()
        for name, parameter in model.named_parameters():
            parameter.copy_(whole(mine[name]))
    return in_precision(problem, model, cast(batch, DOUBLE), DOUBLE).gradient


def _scale(seen: Observation, exact: Gradient) -> float:
    """What the loop multiplies the gradient by, up to what ranks divide it by.

    Read off those parameters whose gradient is finite on all ranks: a model that diverges may overflow by
    itself.
    """
    short = {name for name, arrived in seen.arrived.items() if not arrived.isfinite().all()}
    finite = {name: g for name, g in exact.items() if name not in set().union(*all_gather(short))}
    top = sum(float((seen.arrived[name] * g).sum()) for name, g in finite.items() if name in seen.arrived)
    return sum(all_gather(top)) / (norm(finite) ** 2 or 1.0)


def _differs(found: Tensor, before: Tensor) -> bool:
    return not torch.equal(whole(found), whole(before))


@contextmanager
def _overflowing(start: Start, numbers: Collection[int]) -> Iterator[None]:
    """Inside, the backward of those forward passes starts from infinities."""
    passed = [0]

    def forward(module: Any, inputs: Any, outputs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if passed[0] in numbers:
            for tensor in tensors(outputs):
                if tensor.requires_grad:
                    tensor.register_hook(_infinite)
        passed[0] += 1

    handle = start.inner.register_forward_hook(forward)
    try:
        yield
    finally:
        handle.remove()


def _infinite(gradient: Tensor) -> Tensor:
    return torch.full_like(gradient, math.inf)
