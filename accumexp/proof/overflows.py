"""What a loop makes of overflows: whether it skips the window, and how it moves the loss scale."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .certificate import Check
from .float64 import DOUBLE
from .gradients import first_update, measured_loss_scale
from .larger_batch import dense
from .nested import tensors
from .observation import observe
from .problem import Problem, TrainingState, WholeBatch, cast, unsharded
from .ranks import all_gather, rank, world_size
from .replay import tensors_of
from .rounding import larger_batch_of

SKIPPED = "a window that overflows changes no weight and no optimizer state"
MOVES_ONCE = "it moves once a window, for any number of overflows; measured by the next window's gradient"
# Largest error of the scale's factor, as a logarithm: it is measured in the run's precision.
CLOSE = 0.1


@dataclass(frozen=True)
class Overflow:
    """A window with an overflow, in the run's precision.

    Attributes:
        place: rank and number of the micro-batch that overflows; None for all at once.
        changed: number of weights and tensors of the optimizer's state that it changes.
        parameters: how many of them are weights.
        finite: whether the weights are finite after it.
        ratio: the loss scale in the next window over that in the window before.
        from_start: the same over the scale with which the window begins.
    """

    place: tuple[int, int] | None
    changed: int
    parameters: int
    finite: bool
    ratio: float
    from_start: float

    def off(self, backoff: float) -> float:
        """By how much the scale's factor is not `backoff`, as a logarithm."""
        return abs(math.log(max(self.ratio, 1e-300)) - math.log(backoff))


def overflows(problem: Problem, batch: WholeBatch) -> list[Overflow]:
    """Windows with an overflow in each micro-batch of each rank, and in all at once. A collective call."""
    scaling = problem.scaling
    if scaling is None:
        return []
    batch = cast(batch, problem.dtype)
    count = max(all_gather(len(first_update(TrainingState(problem, problem.dtype), batch).sizes)))
    places = [(r, k) for r in range(world_size()) for k in range(count)]
    overflows = []
    moved = _moved_without(problem, batch)
    for place in [*places, None]:
        numbers = range(count) if place is None else (place[1],)
        every = all_gather(_overflow(problem, batch, place, numbers if _concerns(place) else (), moved))
        # The rank that changes most; the scale is the same on all.
        overflows.append(max(every, key=lambda each: (each.changed, each.off(scaling.backoff_factor))))
    return overflows


def checks(problem: Problem, overflows: Sequence[Overflow]) -> list[Check]:
    """The checks of `overflows`."""
    if problem.scaling is None or not overflows:
        return []
    backoff = problem.scaling.backoff_factor
    changed = max(overflows, key=lambda each: each.changed)
    detail = f"{len(overflows) - 1} places and all at once"
    if changed.changed:
        where = places_in_words([each for each in overflows if each.changed], overflows)
        detail = f"something changed after one in {where}"
    worst = max(overflows, key=lambda each: each.off(backoff))
    alike = [each for each in overflows if abs(each.off(backoff) - worst.off(backoff)) <= CLOSE]
    factor = f"times {worst.ratio:.3g} after one in {places_in_words(alike, overflows)}, {backoff:g} is right"
    precision = str(problem.autocast or problem.dtype).removeprefix("torch.")
    once = f"{MOVES_ONCE} in {precision}, so within 10 %"
    return [
        Check("overflow in each micro-batch", float(changed.changed), 0.0, "count", SKIPPED, detail),
        Check("loss scale after an overflow", worst.off(backoff), CLOSE, "log ratio", once, factor),
    ]


def places_in_words(these: Sequence[Overflow], overflows: Sequence[Overflow]) -> str:
    """In which micro-batches `these` of all `overflows` are."""
    places = [each.place for each in these if each.place is not None]
    if not places:
        return "all micro-batches at once"
    if len(places) == len(overflows) - 1:
        return "any micro-batch"
    texts = []
    for who in sorted({r for r, _ in places}):
        *most, last = [str(k) for r, k in places if r == who]
        numbers = f"{', '.join(most)} or {last}" if most else last
        texts.append(f"micro-batch {numbers}" + (f" of rank {who}" if world_size() > 1 else ""))
    return " or ".join(texts)


def _concerns(place: tuple[int, int] | None) -> bool:
    return place is None or place[0] == rank()


def _moved_without(problem: Problem, batch: WholeBatch) -> float:
    """By what the first window moves the loss scale, without an overflow: 1 unless it grows every window."""
    state = TrainingState(problem, problem.dtype)
    first = {name: p.detach().clone() for name, p in state.parameters().items()}
    exact = larger_batch_of(problem, state.model_in(DOUBLE), batch).gradient
    before = measured_loss_scale(first_update(state, batch, arrivals=True), exact)
    _restore(state, first)
    return measured_loss_scale(observe(state, batch, arrivals=True), exact) / before


def _overflow(
    problem: Problem,
    batch: WholeBatch,
    place: tuple[int, int] | None,
    numbers: Collection[int],
    moved: float,
) -> Overflow:
    """What an overflow in the micro-batches `numbers` of this rank makes of the second window.

    The scale is measured at the first weights: after an update of a run that diverges, gradients may not be
    finite at any scale.

    Args:
        moved: by what the window before moves the scale.
    """
    state = TrainingState(problem, problem.dtype)
    first = {name: p.detach().clone() for name, p in state.parameters().items()}
    exact = larger_batch_of(problem, state.model_in(DOUBLE), batch).gradient
    before = measured_loss_scale(first_update(state, batch, arrivals=True), exact)
    weights = {name: p.detach().clone() for name, p in state.parameters().items()}
    optimizer_before = copy.deepcopy(tensors_of(state.optimizer))
    with _overflowing(state, numbers):
        observe(state, batch)
    after = {name: p.detach() for name, p in state.parameters().items()}
    parameters = sum(_differs(value, weights[name]) for name, value in after.items())
    finite = all(bool(dense(unsharded(value)).isfinite().all()) for value in after.values())
    changed = parameters
    for key, value in tensors_of(state.optimizer).items():
        if key in optimizer_before:
            changed += _differs(value, optimizer_before[key])
        else:  # a fused optimizer that skips may create its state, of zeros
            changed += bool(dense(unsharded(value)).any())
    _restore(state, first)
    ratio = measured_loss_scale(observe(state, batch, arrivals=True), exact) / before
    return Overflow(place, changed, parameters, finite, ratio, ratio / (moved or 1.0))


def _restore(state: TrainingState, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in state.parameters().items():
            parameter.copy_(weights[name])


def _differs(value: Tensor, before: Tensor) -> bool:
    return not torch.equal(dense(unsharded(value)), dense(unsharded(before)))


@contextmanager
def _overflowing(state: TrainingState, numbers: Collection[int]) -> Iterator[None]:
    """Makes the backward passes of `numbers`, in their order, start from infinities."""
    numbers_of: dict[object, int] = {}  # by forward pass, when its backward begins

    def after_forward(module: Any, inputs: Any, outputs: Any) -> None:
        forward_pass = object()

        def overflow(gradient: Tensor) -> Tensor:
            number = numbers_of.setdefault(forward_pass, len(numbers_of))
            return torch.full_like(gradient, math.inf) if number in numbers else gradient

        for tensor in tensors(outputs):
            if tensor.requires_grad:
                tensor.register_hook(overflow)

    with state.inner.register_forward_hook(after_forward):
        yield
