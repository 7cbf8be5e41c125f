"""A run of a training loop and of its larger batch: their updates paired by samples, and what differs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from .audit_counts import cancellation, relative_error
from .audit_records import FitRecord, JointUpdate, joint_updates
from .larger_batch import Gradient
from .ranks import worst
from .rounding import LAMBDA, U64

UNIT = {"float64": U64, "float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class Pair:
    """An update and the larger batch's update on the same samples, from the same weights.

    Attributes:
        number, larger_number: which updates of their runs, from 0.
        update, larger: on all ranks.
        cancellation: of the micro-batches' gradients.
    """

    number: int
    larger_number: int
    update: JointUpdate
    larger: JointUpdate
    cancellation: float

    def error(self) -> tuple[float, str]:
        return relative_error(self.update.first.gradient, self.larger.first.gradient)


@dataclass(frozen=True)
class Levels:
    """By how much the larger batch differs from itself when it is rounded otherwise, relative.

    Attributes:
        gradient: of the gradient, the largest of all updates.
        weights: of what the optimizer adds to the weights.
        buffers: of the buffers.
        how: what was changed, in words.
    """

    gradient: float
    weights: float
    buffers: float
    how: str


class Comparison:
    """The records of a run and of its larger batch on all ranks, paired by the samples of their updates."""

    def __init__(self, run: list[FitRecord], larger: list[FitRecord]) -> None:
        self.run, self.larger = run, larger
        self.updates, self.larger_updates = joint_updates(run), joint_updates(larger)
        self.levels = Levels(math.inf, math.inf, math.inf, "")

    @property
    def ranks(self) -> int:
        return len(self.run)

    @cached_property
    def pairs(self) -> list[Pair]:
        """The updates on the same samples that hold gradients."""
        pairs = []
        for i, j in self.matches:
            update, larger = self.updates[i], self.larger_updates[j]
            skipped = update.first.skipped or larger.first.skipped
            if larger.first.source == i and update.first.gradient and larger.first.gradient and not skipped:
                pairs.append(Pair(i, j, update, larger, cancellation(update)))
        return pairs

    @cached_property
    def matches(self) -> list[tuple[int, int]]:
        """Numbers of updates on the same samples, in the order of both runs."""
        matches, position = [], 0
        for j, larger in enumerate(self.larger_updates):
            samples, source = larger.samples, larger.first.source
            ahead = range(position, len(self.updates)) if source is None else [source]
            i = next((k for k in ahead if k >= position and self.updates[k].samples == samples), None)
            if i is not None:
                matches.append((i, j))
                position = i + 1
        return matches

    def segments(self) -> Iterator[tuple[range, range]]:
        """The updates between two matches: numbers of the run's, and of the larger batch's."""
        before_i = before_j = 0
        for i, j in [*self.matches, (len(self.updates), len(self.larger_updates))]:
            if i > before_i or j > before_j:
                yield range(before_i, i), range(before_j, j)
            before_i, before_j = i + 1, j + 1

    @cached_property
    def never_used(self) -> Counter[int]:
        """Samples that the larger batch uses more often than the run does."""
        return self._all_larger - self._all_used

    def bound(self, pair: Pair) -> float:
        return pair.cancellation * LAMBDA * (self.levels.gradient + self.unit)

    @property
    def unit(self) -> float:
        """The unit roundoff of the coarsest dtype that gradients were delivered in."""
        return max((UNIT.get(name, U64) for record in self.run for name in record.dtypes), default=U64)

    @cached_property
    def errors(self) -> list[tuple[Pair, float, str]]:
        return [(pair, *pair.error()) for pair in self.pairs]

    @cached_property
    def failing(self) -> list[Pair]:
        return [pair for pair, error, _ in self.errors if not error <= self.bound(pair)]

    def hidden(self, pair: Pair) -> bool:
        """Whether the gradients of `pair` are clipped, and differ before, which clipping may hide."""
        one, other = pair.update.first.before_clipping, pair.larger.first.before_clipping
        if one is None or other is None:
            return False
        clips = any(
            relative_error(update.first.gradient, before)[0] > self.unit
            for update, before in ((pair.update, one), (pair.larger, other))
        )
        return clips and not relative_error(one, other)[0] <= self.bound(pair)

    def measure(self, rounded: list[FitRecord], how: str) -> Levels:
        """The levels, by the larger batch `rounded` otherwise."""
        gradient = weights = buffers = 0.0
        for one, other in zip(self.larger_updates, joint_updates(rounded), strict=False):
            if not one.first.gradient or one.first.skipped or other.first.skipped:
                continue
            gradient = worst([gradient, relative_error(other.first.gradient, one.first.gradient)[0]])
            weights = worst([weights, moved_otherwise(other, one)])
            buffers = worst([buffers, buffers_differ(other, one)[0]])
        return Levels(gradient, weights, buffers, how)

    def left_out_by_larger(self, run: range, larger: range) -> bool:
        """Whether updates take samples that the larger batch's loader leaves out of that epoch."""
        if larger or not run:
            return False
        used = sum((self.updates[i].samples for i in run), Counter())
        surplus = self._all_used - self._all_larger
        epochs = max(self._all_larger.values(), default=0)
        return not used - surplus and all(self._all_used[sample] <= epochs for sample in used)

    @cached_property
    def left_out(self) -> list[int]:
        """The updates that take such samples."""
        return [i for run, larger in self.segments() if self.left_out_by_larger(run, larger) for i in run]

    @cached_property
    def _all_used(self) -> Counter[int]:
        return sum((update.samples for update in self.updates), Counter())

    @cached_property
    def _all_larger(self) -> Counter[int]:
        return sum((update.samples for update in self.larger_updates), Counter())

    def same_rates(self, pair: Pair) -> bool:
        one, other = pair.update.first.rates, pair.larger.first.rates
        return len(one) == len(other) and all(
            math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-300) for a, b in zip(one, other, strict=True)
        )

    @cached_property
    def other_rates(self) -> list[Pair]:
        """The pairs of the same number in both runs whose learning rates differ."""
        return [p for p in self.pairs if p.number == p.larger_number and not self.same_rates(p)]

    @cached_property
    def other_steps(self) -> list[Pair]:
        """The pairs in which an optimizer steps a different number of times."""
        return [pair for pair in self.pairs if pair.update.steps != pair.larger.steps]


def _change(update: JointUpdate, names: set[str]) -> Gradient:
    first = update.first
    return {
        name: first.after[name].double() - first.before[name].double()
        for name in names
        if name in first.after and first.after[name].is_floating_point()
    }


def moved_otherwise(one: JointUpdate, other: JointUpdate) -> float:
    """The relative difference of what two updates add to the parameters that have gradients."""
    names = set(other.first.gradient)
    return relative_error(_change(one, names), _change(other, names))[0]


def size_over_step(update: JointUpdate) -> float:
    names = set(update.first.gradient)
    step = math.hypot(*(float(value.norm()) for value in _change(update, names).values()))
    size = math.hypot(*(float(update.first.before[name].double().norm()) for name in names))
    return size / step if step else 0.0


def buffers_differ(one: JointUpdate, other: JointUpdate) -> tuple[float, str]:
    """(the worst relative difference of the floating point buffers after two updates, its name)."""
    figure, where = 0.0, ""
    for name, value in other.first.after.items():
        if name in other.first.gradient or not value.is_floating_point() or name not in one.first.after:
            continue
        difference = float((one.first.after[name].double() - value.double()).norm())
        error = difference / (float(value.double().norm()) or 1.0)
        if not error < figure:
            figure, where = error, name
    return figure, where
