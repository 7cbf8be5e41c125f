"""Decomposition of a wrong gradient: how much each micro-batch counts in it, by least squares."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from .float64 import DOUBLE
from .larger_batch import Gradient, dot, norm
from .nested import batch_size
from .problem import Problem, WholeBatch
from .ranks import all_gather
from .rounding import part_gradient
from .sample_ids import SampleIds

# The largest relative residual, and the largest error of a count, that rounding explains.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Mixture:
    """A gradient as the sum of its micro-batches' parts, each times a count that should be 1.

    Attributes:
        counts: in the order of the micro-batches, of all ranks one after the other.
        weights: of the micro-batches in the loss: samples, or valid items.
        unseen, doubled: samples of the batch in no micro-batch, and in more than one.
        previous: count of the previous window's gradient, which should be 0.
        residual: what the mixture leaves unexplained, relative.
    """

    counts: list[float]
    weights: list[float]
    unseen: list[int]
    doubled: list[int]
    previous: float
    residual: float

    @property
    def explains(self) -> bool:
        return self.residual <= TOLERANCE

    @property
    def correct(self) -> bool:
        """Whether every sample counts once."""
        complete = not self.unseen and not self.doubled and abs(self.previous) <= TOLERANCE
        return complete and all(abs(count - 1) <= TOLERANCE for count in self.counts)

    @property
    def uniform(self) -> bool:
        """Whether all micro-batches count the same."""
        return max(self.counts) - min(self.counts) <= TOLERANCE * max(map(abs, self.counts))


def mixture(
    problem: Problem,
    batch: WholeBatch,
    model: nn.Module,
    gradient: Gradient,
    micro_batches: list[list[int] | None],
    previous: Gradient | None = None,
) -> Mixture | None:
    """Decomposes `gradient` into those of the ranks' `micro_batches` of `batch`, at the weights of `model`.

    None if a micro-batch has unknown samples. `previous` is a gradient that may have been left in `.grad`. A
    collective call.
    """
    numbers = [each for of_rank in all_gather(micro_batches) for each in of_rank]
    if not numbers or any(not each for each in numbers):
        return None
    parts = [part_gradient(problem, model, batch, each or ()) for each in numbers]
    columns, weights = [part for part, _ in parts], [weight for _, weight in parts]
    if previous is not None:
        columns.append(previous)
    # The size of the normal equations is the number of micro-batches, not the model's.
    gram = torch.tensor([[dot(a, b) for b in columns] for a in columns], dtype=DOUBLE)
    right = torch.tensor([[dot(a, gradient)] for a in columns], dtype=DOUBLE)
    # Many micro-batches of a small model have more than one solution: common mistakes come first.
    for common in _common_counts(weights) if previous is None else ():
        shape = torch.tensor([common], dtype=DOUBLE).T
        square = float(shape.T @ gram @ shape)
        factor = float(shape.T @ right) / square if square else 0.0
        counts = [factor * count for count in common]
        residual = _residual(gradient, counts, columns)
        if residual <= TOLERANCE:
            break
    else:
        solution = torch.linalg.lstsq(gram, right, driver="gelsd").solution
        counts = [float(count) for count in solution[:, 0]]
        residual = _residual(gradient, counts, columns)
    previous_count = counts.pop() if previous is not None else 0.0
    occurrences = Counter(number for each in numbers for number in each or ())
    samples = range(batch_size(batch))
    if max(Counter(SampleIds(batch[0]).first_equal().values()).values()) > 1:
        occurrences = Counter(samples)  # equal samples cannot be distinguished
    unseen = [number for number in samples if number not in occurrences]
    doubled = [number for number, count in sorted(occurrences.items()) if count > 1]
    return Mixture(counts, weights, unseen, doubled, previous_count, residual)


def _common_counts(weights: list[float]) -> list[list[float]]:
    """Counts up to a factor if all items count alike, and if all micro-batches do."""
    mean = sum(weights) / len(weights)
    return [[1.0] * len(weights), [mean / weight if weight else 0.0 for weight in weights]]


def _residual(gradient: Gradient, counts: list[float], columns: list[Gradient]) -> float:
    rest = dict(gradient)
    for count, column in zip(counts, columns, strict=True):
        rest = {name: value - count * column[name] for name, value in rest.items()}
    return norm(rest) / (norm(gradient) or 1.0)


def explanation(problem: Problem, mixed: Mixture, ranks: int) -> tuple[str, str]:
    """(what the counts of a mixture mean, what to do), in words and figures."""
    counts, weights = mixed.counts, mixed.weights
    windows, steps = len(counts), problem.steps
    if abs(mixed.previous) > TOLERANCE:
        reason = f"the gradient of the window before is still in it, {mixed.previous:.3g}-fold"
        return reason, "set the gradients to zero before each window"
    if lost := [str(k) for k, count in enumerate(counts) if abs(count) < TOLERANCE]:
        reason = f"micro-batch {', '.join(lost)} of {windows} does not count"
        return reason, "step after the window's last micro-batch, and reset gradients only then"
    for samples, what, advice in (
        (mixed.unseen, "never seen", "let no sample of the window's batch fall away, whatever its size"),
        (mixed.doubled, "counted more than once", "cut the batch into micro-batches that do not overlap"),
    ):
        if samples:
            verb = "is" if len(samples) == 1 else "are"
            return f"of the batch's samples {_numbers(samples)} {verb} {what}", advice
    if mixed.uniform:
        return _uniform_cause(problem, counts[0], windows, ranks)
    total = sum(weights)
    alike = [total / (windows * weight) if weight else 0.0 for weight in weights]
    for factor, what in ((1.0, "alike"), (windows / steps, f"alike, and as if there were {steps}")):
        if all(abs(c - a * factor) <= 1e-5 * max(1, abs(c)) for c, a in zip(counts, alike, strict=True)):
            reason = f"micro-batches count {what}, though they weigh {_list(weights)}: counts {_list(counts)}"
            return (
                reason,
                "divide every micro-batch's sum by the window's weight, not its mean by their number",
            )
    advice = "divide every micro-batch's sum by the window's own weight, and clip the whole window's gradient"
    return f"micro-batches count {_list(counts)} of what they weigh", advice


def _uniform_cause(problem: Problem, count: float, windows: int, ranks: int) -> tuple[str, str]:
    steps, per_rank = problem.steps, windows // ranks
    factors = [
        (windows / ranks, f"the sum of {per_rank} micro-batches' means instead of their mean"),
        (windows, f"the sum of {windows} micro-batches' means instead of their mean"),
        (ranks, f"added over {ranks} ranks where it should be averaged"),
        (1 / ranks, f"divided by {ranks} ranks once more"),
        (windows / (steps * ranks), f"{per_rank} micro-batches divided by {steps}"),
        (1 / windows, f"divided by {windows} twice"),
        (1 / steps, f"divided by {steps} twice"),
        (windows / (steps * ranks) / steps, f"divided by {steps} twice"),
    ]
    why = next((text for value, text in factors if value != 1 and abs(count - value) <= 1e-6 * value), "")
    reason = f"the gradient is {count:.6g} times the larger batch's"
    return (f"{reason}: {why}" if why else reason), "divide by the window's own weight, once"


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values[:6])) + (f" and {len(values) - 6} more" if len(values) > 6 else "")


def _list(values: list[float]) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:6])
    return f"({shown}{', ...' if len(values) > 6 else ''})"
