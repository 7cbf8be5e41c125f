"""What a wrong gradient is made of: how much each micro-batch counts in it, by least squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .draws import drawing
from .everyone import everyone
from .gradients import DOUBLE
from .larger import Gradient, larger_batch, loss_weight, norm
from .problem import Batch, Problem, cast, rows

# A mixture of micro-batch gradients explains a window if no more than this is left, relative.
LEFT = 1e-6


@dataclass(frozen=True)
class Mixture:
    """A gradient as a sum of its micro-batches' parts, each times a number that should be 1.

    Attributes:
        counts: the numbers, in the order of the micro-batches, of all ranks one after the other.
        items: what each micro-batch weighs: samples, or valid items.
        samples: in each micro-batch.
        before: how much the window before still counts; should be 0.
        left: what the mixture leaves unexplained, relative.
    """

    counts: list[float]
    items: list[float]
    samples: list[int]
    before: float
    left: float

    @property
    def explains(self) -> bool:
        return self.left <= LEFT

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
    every = [micro for seen in everyone(micro_batches) for micro in seen]
    if not every or any(not micro for micro in every):
        return None
    batch = cast(batch, DOUBLE)
    columns, items = [], []
    with problem.loss_in(DOUBLE) as loss:
        weight = loss_weight(loss, batch[1])
        for ids in every:
            part = rows(batch, torch.tensor(ids, device=problem.device))
            with drawing(problem, model, batch):
                columns.append(larger_batch(model, loss, part, weight=weight).gradient)
            items.append(float(loss_weight(loss, part[1])))
    if before is not None:
        columns.append(before)
    # The normal equations are as small as the window has micro-batches, whatever the model's size.
    gram = torch.tensor([[_dot(a, b) for b in columns] for a in columns], dtype=DOUBLE)
    right = torch.tensor([[_dot(a, found)] for a in columns], dtype=DOUBLE)
    solution = torch.linalg.lstsq(gram, right, driver="gelsd").solution
    mixed = dict(found)
    for count, column in zip(solution[:, 0].tolist(), columns, strict=True):
        mixed = {name: value - count * column[name] for name, value in mixed.items()}
    left = norm(mixed) / (norm(found) or 1.0)
    counts = [float(value) for value in solution[:, 0]]
    last = counts.pop() if before is not None else 0.0
    return Mixture(counts, items, [len(ids or ()) for ids in every], last, left)


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


def _list(values: list[float]) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:6])
    return f"({shown}{', ...' if len(values) > 6 else ''})"


def _dot(one: Gradient, other: Gradient) -> float:
    return sum(float((one[name].double() * value.double()).sum()) for name, value in other.items())
