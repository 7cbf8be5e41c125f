"""The micro-batches that a window made: their samples, by rank, and their number."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from itertools import accumulate, pairwise
from typing import Any

import torch

from .certificate import Check
from .float64 import DOUBLE
from .nested import batch_size, tensors
from .observation import Observation, observe
from .problem import Problem, TrainingState, WholeBatch, cast
from .ranks import all_gather, world_size
from .sample_ids import row_count

# Parts of a model that are named one by one.
NAMED = 3
AS_ASKED = "forward passes in a window, over how often it passes a sample; as many as `steps`"
# Sample numbers, by rank and micro-batch.
MicroBatches = list[list[list[int]]]


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
    numbers_by_rank = [[list(numbers or ()) for numbers in micro_batches] for micro_batches, _ in ranks]
    times = Counter(number for each in numbers_by_rank for numbers in each for number in numbers)
    most = max(times.values(), default=0)
    if most > 1 and set(times.values()) == {most} and len(times) == samples:
        numbers_by_rank = [_last_passes(each) for each in numbers_by_rank]
    return numbers_by_rank if any(numbers_by_rank) else None


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
    return [[part.tolist() for part in torch.arange(samples).split(share_of(problem))]]


def passes_of(observation: Observation, batch: WholeBatch) -> int:
    """The number of micro-batches of a window: forward passes over how often it passes a sample."""
    samples = batch_size(batch)
    times = max(1, round(sum(observation.sizes) / samples)) if samples else 1
    return max(1, round(len(observation.sizes) / times))


def share_of(problem: Problem) -> int:
    """The samples of a whole micro-batch, as asked for."""
    return -(-problem.samples // (problem.steps * world_size()))


def rows_are_others(observation: Observation, batch: WholeBatch) -> bool:
    """Whether this rank passes rows that are not the batch's samples, and another number of them."""
    unknown = any(numbers is None for numbers in observation.micro_batches)
    return unknown and sum(observation.sizes) != batch_size(batch)


def micro_batches_made(
    problem: Problem, batch: WholeBatch, observation: Observation
) -> tuple[int, int] | None:
    """(micro-batches that a rank makes, samples of the largest); None if no pass was seen. Collective.

    Of several ranks the one that is furthest from the problem's steps.
    """
    share = share_of(problem)
    count, largest = passes_of(observation, batch), max(observation.sizes, default=0)
    fewest = -(-batch_size(batch) // share)
    if rows_are_others(observation, batch) and fewest <= len(observation.sizes) <= problem.steps:
        # Packed samples, pairs in turn or padding: their number does not tell how often they come.
        count, largest = len(observation.sizes), share
    every = all_gather((count, largest))
    if not any(largest for _, largest in every):
        return None
    return max(every, key=lambda each: abs(each[0] - problem.steps))


def micro_batches_check(problem: Problem, observation: Observation, batch: WholeBatch) -> Check | None:
    """Checks that the window makes as many micro-batches as were asked for.

    Fewer ones pass if none is larger than asked: torch.chunk makes 5 of 9 samples where 6 are asked.
    """
    made = micro_batches_made(problem, batch, observation)
    if made is None:
        return None
    count, largest = made
    share = share_of(problem)
    off = 0 if count < problem.steps and largest <= share else abs(count - problem.steps)
    detail = f"steps={problem.steps} asked, {count} made, the largest of {largest} samples"
    if off and (parts := _parts_in_words(problem, batch, share)):
        detail += f"; {parts}"
    return Check("micro-batches a window", off, 0.0, "count", AS_ASKED, detail, about="micro-batches")


def _parts_in_words(problem: Problem, batch: WholeBatch, share: int) -> str:
    """The parts of the model that run on at most `share` samples where others do not, in words; or ""."""
    state = TrainingState(problem, DOUBLE)
    rows: dict[str, list[int]] = {}

    def before_forward(name: str, inputs: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and tensors(inputs):
            rows.setdefault(name, []).append(row_count(inputs))

    with ExitStack() as hooks:
        for name, module in state.inner.named_modules():
            if next(module.children(), None) is None and next(module.parameters(), None) is not None:
                hooks.enter_context(
                    module.register_forward_pre_hook(lambda _, inputs, n=name: before_forward(n, inputs))
                )
        observe(state, cast(batch, DOUBLE))
    split = [name for name, sizes in rows.items() if max(sizes) <= share and len(sizes) > 1]
    if not split or len(split) == len(rows):
        return ""
    names = ", ".join(split[:NAMED]) + (f", ... ({len(split)} parts)" if len(split) > NAMED else "")
    times, largest = len(rows[split[0]]), max(rows[split[0]])
    verb = "runs" if len(split) == 1 else "run"
    return f"only {names} {verb} by micro-batch, {times} times on at most {largest} samples"


class MicroBatchesMade:
    """Compares how many micro-batches each update makes with what was asked for."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._off: list[tuple[int, int, str]] = []

    def compare(self, number: int, batch: WholeBatch, observation: Observation, smaller: bool) -> None:
        """Compares update `number`. Too many in a smaller window pass. A collective call.

        Fewer pass if none of them is larger than asked: the other samples went another way.
        """
        made = micro_batches_made(self.problem, batch, observation)
        if made is None:
            return
        steps, samples = self.problem.steps, batch_size(batch)
        count, largest = made
        share = share_of(self.problem)
        if smaller:
            fewest = -(-samples // (2 * share * world_size()))
            off, made_of = max(0, fewest - count), f"{count} made of {samples} samples"
        else:
            off, made_of = abs(count - steps), f"steps={steps} asked, {count} made"
        if count < steps and largest <= share:
            off = 0
        self._off.append((number, off, made_of))

    def check(self, name: str) -> Check:
        """The check of all updates, whose figures all ranks share."""
        number, figure, made = max(self._off, key=lambda each: each[1], default=(0, 0, ""))
        first, _, of_first = next((each for each in self._off if each[1]), (0, 0, ""))
        detail = f"off in update {number}: {made}" if figure else "no difference"
        if first != number and figure:
            detail += f", first in update {first} ({of_first})"
        return Check(name, figure, 0.0, "count", AS_ASKED, detail, about="micro-batches")
