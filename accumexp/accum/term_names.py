"""The terms that a loss has: found in the first window, the same on all ranks, and checked in later ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from .ranks import Ranks
from .refusals import LossRefused
from .terms import SampleMean, SeveralTerms, Term

REMEDY = "return every term in every batch, with total and weight 0 where it has no items"

# Difference of a weight that is counted twice, relative to it, that rounding cannot explain.
TOLERANCE = 1e-2


class _Pass(NamedTuple):
    """What the micro-batches of a rank had in one pass."""

    names: list[str]
    late: list[str]
    means: dict[str, int]  # by mean over samples: the micro-batches that have it
    micro_batches: int


class TermNames:
    """The names of a window's terms, which it adds micro-batch by micro-batch.

    A micro-batch or a rank may lack a term: it has no items there. All ranks have to know it, because they
    add its sums, so on several ranks no term is new after the first window (`agree`).
    """

    def __init__(self, loss: SeveralTerms, ranks: Ranks, counted: list[str]) -> None:
        self.loss = loss
        self.ranks = ranks
        self.counted = counted  # those whose weights the targets determine
        self.late: list[str] = list(loss.late or ())
        self._names: list[str] = list(loss.names or ())
        self._in: dict[str, int] = {}  # by mean over samples: the micro-batches that have it
        self._micro_batches = 0
        self._coefficients: dict[str, float] = {}

    def add(self, terms: Mapping[str, Term], late: Iterable[str]) -> None:
        """Adds those of a micro-batch with samples.

        Raises:
            ValueError: for a term that comes too late.
        """
        self._micro_batches += 1
        for name, term in terms.items():
            if isinstance(term, SampleMean):
                self._in[name] = self._in.get(name, 0) + 1
            if name not in self._names:
                self._check_new(name)
                self._names.append(name)
        for name in late:
            if name not in self.late:
                self._check_new(name)
                self.late.append(name)

    def _check_new(self, name: str) -> None:
        if self.loss.names is not None and self.ranks.size > 1:
            raise LossRefused(f"the loss returned a term {name!r} that it did not return before: {REMEDY}")

    def check_coefficients(self, terms: Mapping[str, Term]) -> None:
        """Raises a ValueError for a coefficient that is no constant: the larger batch has one."""
        for name, term in terms.items():
            coefficient = term.coefficient
            if isinstance(coefficient, Tensor):
                if coefficient.requires_grad:
                    raise LossRefused(
                        f"term {name!r} has a coefficient with a gradient: multiply total by it, or let the "
                        "loss declare couples = True"
                    )
                continue
            first = self._coefficients.setdefault(name, coefficient)
            if first != coefficient and not math.isnan(first):
                raise LossRefused(
                    f"term {name!r} has the coefficients {first:g} and {coefficient:g} in micro-batches of "
                    "one window: multiply total by what varies"
                )

    def agree(self) -> None:
        """Ends a pass of the window. In the first window the ranks agree on the terms, and the hosts wait.

        Raises:
            ValueError: on all ranks, for a mean over samples that some micro-batches do not have.
        """
        passes = [_Pass(self._names, self.late, self._in, self._micro_batches)]
        if self.loss.names is None:
            passes = self.ranks.objects(passes[0])
            self._names = _united([*(each.names for each in passes), self.counted])
            self.late = _united(each.late for each in passes)
        means = _united(each.means for each in passes)
        partial = [m for m in means if any(each.means.get(m, 0) < each.micro_batches for each in passes)]
        if partial:
            raise LossRefused(
                f"term {partial[0]!r} is a mean over samples that some micro-batches do not have: return it "
                "in every batch, or a Term with its own weight"
            )
        self.loss.names, self.loss.late = tuple(self._names), tuple(self.late)


def check_counts(counted: Mapping[str, Any], returned: Mapping[str, Any]) -> None:
    """Compares the weights that `weights(targets)` counted with the terms' own. Waits for the device.

    Raises:
        ValueError: for one that differs.
    """
    for name in counted:
        declared, weight = float(counted[name]), float(returned[name])
        if abs(declared - weight) > TOLERANCE * abs(declared):
            raise LossRefused(
                f"term {name!r}: weights(targets) counts {declared:g} in the window, and the terms that the "
                f"loss returns by this name weigh {weight:g}: both have to be the same"
            )


def _united(lists: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))
