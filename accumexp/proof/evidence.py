"""What is kept of the first update that fails: enough to find out why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from .certificate import Cause
from .gradients import Comparison
from .larger_batch import Gradient
from .observation import Observation
from .problem import WholeBatch
from .rounding import ExpectedUpdate

# Causes that concern the optimizer's steps alone.
STEPS = ("no update", "optimizer steps")


@dataclass(eq=False)
class Failure:
    """The first update whose gradient is not the larger batch's.

    Attributes:
        batch: of all ranks.
        observation: of this rank.
        expected: the larger batch's update.
        model: in fp64, with the weights before the update.
        previous: the gradient that the optimizer received in the update before, or None.
        window: what kind of window it is where it is not a whole one, such as "12 of 16 samples".
        updates: numbers of all updates that fail; empty for a window of its own, from the first weights.
        compared: numbers of all updates that were compared.
        steps: numbers of the updates without exactly one optimizer step.
        smaller: numbers of the updates on smaller windows.
        factors: how many times the larger batch's a failing update's gradient is, by update; None for none.
        weights: of the updates' windows in the loss, by update.
        latest: the last update on a whole window that fails; None for a large model.
        precision: that the update was made in; "" for fp64.
        tolerance: the relative error that rounding explains.
    """

    batch: WholeBatch
    observation: Observation
    expected: ExpectedUpdate
    comparison: Comparison
    model: nn.Module
    previous: Gradient | None = None
    window: str = ""
    updates: list[int] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    smaller: list[int] = field(default_factory=list)
    factors: dict[int, float | None] = field(default_factory=dict)
    weights: dict[int, float] = field(default_factory=dict)
    latest: Failure | None = None
    precision: str = ""
    tolerance: float = 1e-6

    @property
    def when(self) -> str:
        """The updates that fail, in words, such as "from update 3 on"; "" if all do."""
        if not self.updates:
            return f"in a window of {self.window}" if self.window else ""
        return self.in_words(self.updates)

    def in_words(self, updates: list[int]) -> str:
        """Which `updates` these are; and the first one's window if all of them are smaller ones."""
        first = f"update {updates[0]}: " if len(updates) > 1 else ""
        smaller = self.window and set(updates) <= set(self.smaller)
        of = f" ({first}a window of {self.window})" if smaller else ""
        return f"{updates_in_words(updates, self.compared)}{of}".strip()

    def follow(self, updates: Failure) -> None:
        """Takes over in which updates the fault shows, from the failure of updates."""
        self.updates, self.compared, self.steps = updates.updates, updates.compared, updates.steps
        self.smaller, self.factors, self.weights = updates.smaller, updates.factors, updates.weights
        self.latest = updates.latest
        if self.window and not set(self.updates) <= set(self.smaller):
            self.updates = []

    def other_factors(self, factor: float, uncommon: bool = False) -> str:
        """By which other factors than this update's the gradient is wrong in other updates, in words.

        Args:
            uncommon: whether to tell updates whose gradient is no multiple of the larger batch's too.
        """
        no_factor = uncommon and any(self.factors.get(number) is None for number in self.updates[1:])
        every = [each for number in self.updates if (each := self.factors.get(number)) is not None]
        others = [each for each in every if abs(each - factor) > 1e-3 * abs(factor)]
        if others:
            low, high = min(others), max(others)
            span = f"{low:.3g}" if high - low <= 1e-3 * abs(high) else f"{low:.3g} to {high:.3g}"
            text = f"{span} times{' or no common factor' if no_factor else ''} in others"
        elif no_factor:
            alone = all(self.factors.get(number) is None for number in self.updates[1:])
            text = f"no common factor in {'others' if alone else 'some others'}"
        else:
            return ""
        return f" in update {self.updates[0]} ({text})"

    def cause(self, source: str, reason: str, shown: str, advice: str) -> Cause:
        """A cause of this failure, which says in which updates it shows."""
        precision = f"in {self.precision}" if self.precision else ""
        when = self.in_words(self.steps) if self.steps and source in STEPS else self.when
        reason = ", ".join(filter(None, (reason, when, precision)))
        return Cause(source, "", reason, self.comparison.error, shown, advice)


def all_updates_in_words(
    failing: Sequence[int], compared: Sequence[int], windows: Mapping[int, str] | None = None
) -> str:
    """As `updates_in_words`, but "in every update" if all are; and the first one's window if all are smaller.

    Args:
        windows: descriptions of the smaller windows, by update.
    """
    windows = windows or {}
    when = updates_in_words(list(failing), list(compared)) if len(compared) > 1 else f"in update {failing[0]}"
    if set(failing) <= windows.keys():
        first = f"update {failing[0]}: " if len(failing) > 1 else ""
        return f"{when or 'in every update'} ({first}a window of {windows[failing[0]]})"
    return when or "in every update"


def updates_in_words(failing: list[int], compared: list[int]) -> str:
    """Which of the `compared` updates are `failing`; "" if all are."""
    if failing == compared:
        return ""
    first = failing[0]
    if len(failing) == 1:
        return f"in update {first}"
    if failing == [number for number in compared if number >= first]:
        return f"from update {first} on"
    more = ", ".join(map(str, failing[:4])) + (", ..." if len(failing) > 4 else "")
    return f"in updates {more}"
