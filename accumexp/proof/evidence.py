"""What is kept of the first update that fails: enough to find out why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import nn

from .certificate import Cause
from .gradients import Comparison
from .larger_batch import Gradient
from .nested import batch_size
from .observation import Observation
from .problem import Problem, WholeBatch
from .ranks import all_gather, world_size
from .rounding import ExpectedUpdate

MicroBatches = list[list[list[int]]]


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
    precision: str = ""
    tolerance: float = 1e-6

    @property
    def when(self) -> str:
        """The updates that fail, in words, such as "from update 3 on"; "" if all do."""
        of = f" (a window of {self.window})" if self.window else ""
        if not self.updates:
            return f"in a window of {self.window}" if self.window else ""
        return f"{updates_in_words(self.updates, self.compared)}{of}".strip()

    def cause(self, source: str, reason: str, shown: str, advice: str) -> Cause:
        """A cause of this failure, which says in which updates it shows."""
        precision = f"in {self.precision}" if self.precision else ""
        reason = ", ".join(filter(None, (reason, self.when, precision)))
        return Cause(source, "", reason, self.comparison.error, shown, advice)


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


def rank_micro_batches(batch: WholeBatch, observation: Observation) -> MicroBatches | None:
    """The sample numbers of the micro-batches of each rank; None if they are not known. A collective call.

    Where a window passes every sample several times, its last pass counts. Rows that are not in the batch are
    taken in their order on a single rank, if their number is right.
    """
    samples = batch_size(batch)
    ranks = all_gather((observation.micro_batches, observation.sizes))
    if any(numbers is None for micro_batches, _ in ranks for numbers in micro_batches):
        sizes = ranks[0][1]
        if world_size() > 1 or sum(sizes) != samples:
            return None
        return [[list(range(a, b)) for a, b in pairwise(accumulate(sizes, initial=0))]]
    known = [[list(numbers or ()) for numbers in micro_batches] for micro_batches, _ in ranks]
    times = Counter(number for each in known for numbers in each for number in numbers)
    most = max(times.values(), default=0)
    if most > 1 and set(times.values()) == {most} and len(times) == samples:
        known = [_last_passes(each) for each in known]
    return known if any(known) else None


def _last_passes(micro_batches: list[list[int]]) -> list[list[int]]:
    """The last forward pass of every micro-batch that is passed several times."""
    last: list[list[int]] = []
    seen: set[int] = set()
    for numbers in reversed(micro_batches):
        if seen.isdisjoint(numbers):
            last.append(numbers)
            seen.update(numbers)
    return last[::-1]


def is_partition(micro_batches: MicroBatches, samples: int) -> bool:
    """Whether every sample is in exactly one of the micro-batches."""
    numbers = sorted(number for each in micro_batches for part in each for number in part)
    return numbers == list(range(samples))


def even_micro_batches(problem: Problem, samples: int) -> MicroBatches:
    """The samples in order, cut into micro-batches of the problem's size."""
    size = -(-problem.samples // (problem.steps * world_size()))
    return [[part.tolist() for part in torch.arange(samples).split(size)]]
