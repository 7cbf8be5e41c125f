"""What a wrong gradient is made of: how much each micro-batch counts in it, by least squares."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from ..accum.batch import batch_size
from .gradients import DOUBLE
from .larger_batch import Gradient, norm
from .problem import Batch, Ids, Problem
from .ranks import all_gather
from .rounding import part_in_precision

# A mixture of micro-batch gradients explains a window if no more than this is left, relative.
LEFT = 1e-6


@dataclass(frozen=True)
class Mixture:
    """A gradient as a sum of its micro-batches' parts, each times a number that should be 1.

    Attributes:
        counts: the numbers, in the order of the micro-batches, of all ranks one after the other.
        items: what each micro-batch weighs: samples, or valid items.
        samples: in each micro-batch.
        unseen, doubled: samples of the batch that are in no micro-batch, and in more than one.
        before: how much the window before still counts; should be 0.
        left: what the mixture leaves unexplained, relative.
    """

    counts: list[float]
    items: list[float]
    samples: list[int]
    unseen: list[int]
    doubled: list[int]
    before: float
    left: float

    @property
    def explains(self) -> bool:
        return self.left <= LEFT

    @property
    def right(self) -> bool:
        """Whether every sample counts as it should, as far as the mixture tells."""
        whole = not self.unseen and not self.doubled and abs(self.before) <= LEFT
        return whole and all(abs(count - 1) <= LEFT for count in self.counts)

    @property
    def alike(self) -> bool:
        """Whether all micro-batches count the same."""
        return max(self.counts) - min(self.counts) <= 1e-6 * max(map(abs, self.counts))


def mixture(
    problem: Problem,
    batch: Batch,
    model: nn.Module,
    found: Gradient,
    micro_batches: list[list[int] | None],
    before: Gradient | None = None,
) -> Mixture | None:
    """How `found` is mixed from the micro-batches that the loop saw in `batch`, from the weights of `model`.

    None where their samples are not known. `before` is a gradient that may have been left in `.grad`. All
    ranks must call.
    """
    every = [micro for seen in all_gather(micro_batches) for micro in seen]
    if not every or any(not micro for micro in every):
        return None
    parts = [part_in_precision(problem, model, batch, ids or (), DOUBLE) for ids in every]
    columns, items = [column for column, _ in parts], [weight for _, weight in parts]
    if before is not None:
        columns.append(before)
    # The normal equations are as small as the window has micro-batches, whatever the model's size.
    gram = torch.tensor([[_dot(a, b) for b in columns] for a in columns], dtype=DOUBLE)
    right = torch.tensor([[_dot(a, found)] for a in columns], dtype=DOUBLE)
    # Many micro-batches of a small model have more than one mixture: the usual mistakes come first.
    counts = []
    left = 1.0
    for usual in _usual(items) if before is None else ():
        shape = torch.tensor([usual], dtype=DOUBLE).T
        below = float(shape.T @ gram @ shape)
        factor = float(shape.T @ right) / below if below else 0.0
        counts = [factor * value for value in usual]
        left = _left(found, counts, columns)
        if left <= LEFT:
            break
    else:
        solution = torch.linalg.lstsq(gram, right, driver="gelsd").solution
        counts = [float(value) for value in solution[:, 0]]
        left = _left(found, counts, columns)
    last = counts.pop() if before is not None else 0.0
    times = Counter(number for ids in every for number in ids or ())
    if max(Counter(Ids.of(batch[0]).alike().values()).values()) > 1:
        times = Counter(range(batch_size(batch)))  # of equal samples nobody knows which was seen
    unseen = [number for number in range(batch_size(batch)) if number not in times]
    doubled = [number for number, count in sorted(times.items()) if count > 1]
    return Mixture(counts, items, [len(ids or ()) for ids in every], unseen, doubled, last, left)


def reading(problem: Problem, mixed: Mixture, ranks: int) -> tuple[str, str]:
    """(what the counts mean, what to do), in words and figures."""
    counts, items = mixed.counts, mixed.items
    windows = len(counts)
    steps = problem.steps
    if abs(mixed.before) > 1e-6:
        return (
            f"the gradient of the window before is still in it, {mixed.before:.3g}-fold",
            "set the gradients to zero before each window",
        )
    lost = [k for k, count in enumerate(counts) if abs(count) < 1e-6]
    if lost:
        names = ", ".join(str(k) for k in lost)
        return (
            f"micro-batch {names} of {windows} does not count",
            "step after the window's last micro-batch, and reset gradients only then",
        )
    for numbers, what, advice in (
        (mixed.unseen, "never seen", "let no sample of the window's batch fall away, whatever its size"),
        (mixed.doubled, "counted more than once", "cut the batch into micro-batches that do not overlap"),
    ):
        if numbers:
            return f"of the batch's samples {_numbers(numbers)} {_are(numbers)} {what}", advice
    if mixed.alike:
        return _factor(problem, counts[0], windows, ranks)
    total = sum(items)
    alike = [total / (windows * weight) if weight else 0.0 for weight in items]
    for divisor, what in ((1.0, "alike"), (windows / steps, f"alike, and as if there were {steps}")):
        if all(abs(c - a * divisor) <= 1e-5 * max(1, abs(c)) for c, a in zip(counts, alike, strict=True)):
            return (
                f"micro-batches count {what}, though they weigh {_list(items)}: counts {_list(counts)}",
                "divide every micro-batch's sum by the window's weight, not its mean by their number",
            )
    return (
        f"micro-batches count {_list(counts)} of what they weigh",
        "divide every micro-batch's sum by the window's own weight, and clip the whole window's gradient",
    )


def _factor(problem: Problem, count: float, windows: int, ranks: int) -> tuple[str, str]:
    steps, full = problem.steps, problem.steps * ranks
    known = [
        (windows / ranks, f"the sum of {windows // ranks} micro-batches' means instead of their mean"),
        (windows, f"the sum of {windows} micro-batches' means instead of their mean"),
        (ranks, f"added over {ranks} ranks where it should be averaged"),
        (1 / ranks, f"divided by {ranks} ranks once more"),
        (windows / full, f"{windows // ranks} micro-batches divided by {steps}"),
        (1 / windows, f"divided by {windows} twice"),
        (1 / steps, f"divided by {steps} twice"),
        (windows / full / steps, f"divided by {steps} twice"),
    ]
    why = next((text for value, text in known if value != 1 and abs(count - value) <= 1e-6 * value), "")
    reason = f"the gradient is {count:.6g} times the larger batch's"
    return (f"{reason}: {why}" if why else reason), "divide by the window's own weight, once"


def _numbers(values: list[int]) -> str:
    return ", ".join(map(str, values[:6])) + (f" and {len(values) - 6} more" if len(values) > 6 else "")


def _are(values: list[int]) -> str:
    return "is" if len(values) == 1 else "are"


def _list(values: list[float]) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:6])
    return f"({shown}{', ...' if len(values) > 6 else ''})"


def _usual(items: list[float]) -> list[list[float]]:
    """All items alike, and all micro-batches alike."""
    mean = sum(items) / len(items)
    return [[1.0] * len(items), [mean / weight if weight else 0.0 for weight in items]]


def _left(found: Gradient, counts: list[float], columns: list[Gradient]) -> float:
    """What the mixture of `columns` leaves of `found`, relative."""
    mixed = dict(found)
    for count, column in zip(counts, columns, strict=True):
        mixed = {name: value - count * column[name] for name, value in mixed.items()}
    return norm(mixed) / (norm(found) or 1.0)


def _dot(one: Gradient, other: Gradient) -> float:
    return sum(float((one[name].double() * value.double()).sum()) for name, value in other.items())
