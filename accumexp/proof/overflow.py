"""The loss scale under overflow: infinities in the backward pass of one micro-batch after the other."""

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
from .float64 import DOUBLE
from .gradients import first_update, measured_loss_scale
from .observation import observe
from .problem import Problem, TrainingState, WholeBatch, cast, unsharded
from .ranks import all_gather, rank, world_size
from .replay import tensors_of
from .rounding import larger_batch_of

SKIPPED = "a window that overflows changes no weight and no optimizer state"
MOVES_ONCE = "it moves once a window, whatever overflowed; measured by the next window's gradient"


def overflow_checks(problem: Problem, batch: WholeBatch) -> list[Check]:
    """Checks an overflow in each micro-batch of each rank, and in all at once, in the run's precision."""
    scaling = problem.scaling
    if scaling is None:
        return []
    batch = cast(batch, problem.dtype)
    count = max(all_gather(len(first_update(TrainingState(problem, problem.dtype), batch).sizes)))
    places = [(r, k) for r in range(world_size()) for k in range(count)]
    changes, scales = [], []
    for who, k in [*places, (None, None)]:
        numbers = range(count) if k is None else (k,)
        where = "every micro-batch" if k is None else f"micro-batch {k}"
        if who is not None and world_size() > 1:
            where += f" of rank {who}"
        changed, ratio = _overflow(problem, batch, numbers if who in (None, rank()) else ())
        changes.append((changed, where))
        off = abs(math.log(max(ratio, 1e-300)) - math.log(scaling.backoff_factor))
        scales.append((off, where, ratio))
    changed, where = max(all_gather(max(changes)))
    off, place, ratio = max(max(each) for each in all_gather(scales))
    detail = f"something changed after {where}" if changed else f"{len(places)} places and all at once"
    factor = f"times {ratio:.3g} after {place}, {scaling.backoff_factor:g} is right"
    precision = str(problem.autocast or problem.dtype).removeprefix("torch.")
    once = f"{MOVES_ONCE} in {precision}, so within 10 %"
    return [
        Check("overflow in each micro-batch", changed, 0.0, "count", SKIPPED, detail),
        Check("loss scale after an overflow", off, 0.1, "log ratio", once, factor),
    ]


def _overflow(problem: Problem, batch: WholeBatch, numbers: Collection[int]) -> tuple[float, float]:
    """(number of tensors that an overflow in `numbers` changed, factor by which the scale moved)."""
    state = TrainingState(problem, problem.dtype)
    exact = larger_batch_of(problem, state.model_in(DOUBLE), batch).gradient
    before = measured_loss_scale(first_update(state, batch, arrivals=True), exact)
    weights = {name: p.detach().clone() for name, p in state.parameters().items()}
    optimizer_before = copy.deepcopy(tensors_of(state.optimizer))
    with _overflowing(state, numbers):
        observe(state, batch)
    changed = sum(_differs(p.detach(), weights[name]) for name, p in state.parameters().items())
    for key, value in tensors_of(state.optimizer).items():
        if key in optimizer_before:
            changed += _differs(value, optimizer_before[key])
        else:  # a fused optimizer that skips may create its state, of zeros
            changed += bool(unsharded(value).any())
    exact = larger_batch_of(problem, state.model_in(DOUBLE), batch).gradient
    after = measured_loss_scale(observe(state, batch, arrivals=True), exact)
    return float(changed), after / before


def _differs(value: Tensor, before: Tensor) -> bool:
    return not torch.equal(unsharded(value), unsharded(before))


@contextmanager
def _overflowing(state: TrainingState, numbers: Collection[int]) -> Iterator[None]:
    """Makes the backward pass of forward passes `numbers` start from infinities."""
    passes = 0

    def after_forward(module: Any, inputs: Any, outputs: Any) -> None:
        nonlocal passes
        if not torch.is_grad_enabled():
            return
        if passes in numbers:
            for tensor in tensors(outputs):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
        passes += 1

    handle = state.inner.register_forward_hook(after_forward)
    try:
        yield
    finally:
        handle.remove()
