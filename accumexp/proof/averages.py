"""What a loss averages over, and losses that add two means."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .float64 import DOUBLE

# Relative difference of two values that count as equal: losses often add 1e-8 to their denominator.
TOLERANCE = 1e-5
WEIGHT_AND_TOTAL = "give it `weight(targets)` and `total(outputs, targets)`"


@dataclass(frozen=True)
class Average:
    """What a loss averages over, where that is not the number of samples.

    Attributes:
        kind: "items" for a mean over something else than samples, "sum" for a sum over samples, "coupled" for
            a loss that is no mean of its parts' losses, "total" if `total` is not the sum of its parts'.
        weight: of the batch in the loss: the number of items, or their summed weights; nan if not known.
        samples: of the batch.
        description: of the weight, such as "212 valid targets (those other than -100)"; of both where a loss
            that is no mean of its parts' losses is the sum of two means.
    """

    kind: Literal["items", "sum", "coupled", "total"]
    weight: float
    samples: int
    description: str = ""

    @property
    def reason(self) -> str:
        """What was measured, in one phrase."""
        if self.kind == "items":
            return f"your loss averages over {self.description}, not {self.samples} samples"
        if self.kind == "sum":
            return f"your loss is a sum over {self.samples} samples, not their mean"
        if self.kind == "total":
            return f"your loss's total of {self.samples} samples is not the sum of its parts' totals"
        if self.description:
            of_each = "in each of which a micro-batch weighs differently"
            return f"your loss adds means over {self.description}, {of_each}"
        return f"your loss of {self.samples} samples is no mean of its parts' losses"

    @property
    def advice(self) -> str:
        """What to do."""
        if self.kind == "items" and "among the outputs" in self.description:
            return f"put them into the targets, and {WEIGHT_AND_TOTAL}"
        if self.kind == "items":
            return WEIGHT_AND_TOTAL
        if self.kind == "sum":
            return 'divide it by their number, or set its attribute `reduction` to "sum"'
        if self.kind == "total":
            return "let `total` return the weighted sum of the items' losses, and `weight` their weight"
        if self.description:
            return "divide each term by its own number of items in the whole window"
        return "make it a mean of the samples' own losses: it couples samples, or has several denominators"


def two_means(
    part_losses: Sequence[float],
    unions: Sequence[Sequence[int]],
    values: Sequence[float],
    items: Sequence[tuple[str, Sequence[float]]],
) -> str:
    """Two of `items` over which a loss may average in two terms that it adds, in words; "" if none fit.

    With shares p_i and q_i of both items in the part i of a union of parts, the union's loss is the sum of
    p_i L_i + (q_i - p_i) b_i, where b_i is the second mean of the part i: linear in the unknown b.

    Args:
        part_losses: L, the loss of each part.
        unions: numbers of their parts.
        values: the loss of each union.
        items: descriptions, and the number of items in each part.
    """
    members = torch.zeros(len(unions), len(part_losses), dtype=DOUBLE)
    for row, union in enumerate(unions):
        members[row, list(union)] = 1
    for (one, first), (other, second) in itertools.combinations(items, 2):
        p, q = (members * torch.tensor(each, dtype=DOUBLE) for each in (first, second))
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        left = torch.tensor(values, dtype=DOUBLE) - p @ torch.tensor(part_losses, dtype=DOUBLE)
        means = torch.linalg.lstsq(q - p, left.unsqueeze(1), driver="gelsd").solution
        if float(((q - p) @ means - left.unsqueeze(1)).norm()) <= TOLERANCE * float(left.norm()):
            return f"{one} and over {other}"
    return ""
