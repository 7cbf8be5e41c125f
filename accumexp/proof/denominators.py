"""By what a loop divides where its gradient is the larger batch's but for a factor."""

from __future__ import annotations

from collections.abc import Iterator

from .additivity import loss_average
from .counts import Decomposition
from .float64 import DOUBLE
from .loss_items import ignore_index_of, leaves, likely_counts
from .nested import batch_size, tensors
from .problem import copy_in
from .rounding import larger_batch_of


def denominator_in_words(parts: Decomposition, count: float, whole: bool) -> str:
    """What the sum of the micro-batches' losses seems to be divided by, where it counts `count` times; or "".

    Args:
        whole: whether `count` is that of all parameters.
    """
    if count <= 0:
        return ""
    total, items = _right_denominator(parts)
    divisor = total / count
    near = max(1e-6, parts.count_tolerance) * max(1.0, divisor)
    for text, value in _candidates(parts):
        if abs(value - divisor) <= near and abs(value - total) > near:
            return f"divided by {text}, where {items}"
    windows = len(parts.weights)
    for place, weight in (("last", parts.weights[-1]), ("first", parts.weights[0])):
        if weight != sum(parts.weights) / windows and abs(windows * weight - total / count) <= near:
            return f"divided by {windows} times the {place} micro-batch's weight, {weight:g}"
    number = windows / count
    if number >= 1 and abs(number - round(number)) <= near / divisor * number and round(number) != windows:
        return f"divided by {round(number)} where {windows} micro-batches are added"
    return _of_another_update(parts, divisor, near, items) or (
        f"as if divided by {round(divisor)} where {items}"
        if whole and _is_whole(divisor, near) and not any(_is_whole(n, 1e-6) for n in (count, 1 / count))
        else ""
    )


def _is_whole(number: float, near: float) -> bool:
    return number >= 1 and abs(number - round(number)) <= near


def _right_denominator(parts: Decomposition) -> tuple[float, str]:
    """What the larger batch's loss is divided by, and a phrase that says so."""
    problem, failure = parts.problem, parts.failure
    inputs, targets = failure.batch
    total = sum(parts.weights)
    if hasattr(problem.loss, "total"):
        return total, f"{total:g} count"
    outputs = larger_batch_of(problem, failure.model, failure.batch).outputs
    average = loss_average(problem.loss, outputs, targets, copy_in(failure.model, DOUBLE), inputs)
    if average is not None and average.kind == "items" and average.weight == average.weight:
        return average.weight, f"what counts is {average.description}"
    return total, f"{total:g} samples count" if total == batch_size(failure.batch) else f"{total:g} count"


def _candidates(parts: Decomposition) -> Iterator[tuple[str, float]]:
    """Descriptions of what the batch has, and its number."""
    targets = parts.failure.batch[1]
    integers = [t for t in tensors(targets) if not t.is_floating_point()]
    if integers:
        yield f"all {integers[0].numel()} targets", integers[0].numel()
    samples = batch_size(parts.failure.batch)
    yield f"{samples} samples", samples
    every = leaves(targets)
    for leaf in every:
        # Of one class for each sample none is ignored, and any number may be that of one class.
        if leaf.dim() > 1 or (leaf.dim() and len(every) > 1):
            for text, number in likely_counts(
                leaf, "targets", len(every) == 1, ignore_index_of(parts.problem.loss)
            ):
                yield text.format(number(leaf)), number(leaf)


def _of_another_update(parts: Decomposition, divisor: float, near: float, items: str) -> str:
    """Whether `divisor` is the weight of an earlier update's window, the latest first."""
    failure = parts.failure
    if not failure.updates:
        return ""
    for update in sorted((n for n in failure.weights if n < failure.updates[0]), reverse=True):
        if abs(failure.weights[update] - divisor) <= near:
            return f"divided by {divisor:g}, the weight of update {update}'s window, where {items}"
    return ""
