"""The loss of a split, added up batch by batch, each of its terms over its own denominator."""

from __future__ import annotations

from typing import Any

import torch

from ..accum import Ranks, WindowLoss, window_loss
from ..accum.terms import CoupledLoss, SeveralTerms, Term, has_terms
from ..accum.two_passes import WindowOutputs

LOSS = "loss"


class LossSums:
    """The totals and weights of a loss's terms over a split.

    A loss that couples samples is computed on one evaluation batch at a time, over all ranks; a term of it
    that is a mean over samples is averaged over the batches by their samples.
    """

    def __init__(self, loss: WindowLoss, ranks: Ranks) -> None:
        self.loss = window_loss(loss)
        self.ranks = ranks
        self._totals: dict[str, Any] = {}
        self._weights: dict[str, Any] = {}
        self._coefficients: dict[str, float] = {}

    def add(self, outputs: Any, targets: Any, samples: int) -> None:
        """Adds a batch of which this rank has `samples`; with 0 it is padding."""
        if isinstance(self.loss, CoupledLoss):
            terms = self._of_all_ranks(self.loss, outputs, targets, samples)
            counted = not self.ranks.rank
        else:
            terms, counted = self._of(outputs, targets), bool(samples)
        for name, term in terms.items():
            self._coefficients[name] = term.coefficient
            self._totals[name] = self._totals.get(name, 0.0) + (term.total if counted else 0.0)
            self._weights[name] = self._weights.get(name, 0.0) + (term.weight if counted else 0.0)
        if not getattr(self.loss, "counts", True):
            self._weights[LOSS] += 1 / self.ranks.size

    def _of(self, outputs: Any, targets: Any) -> dict[str, Term]:
        if not has_terms(self.loss):
            total = self.loss.total(outputs, targets)
            if not has_terms(self.loss):
                counts = getattr(self.loss, "counts", True)
                return {LOSS: Term(total, self.loss.weight(targets) if counts else 0.0)}
            self.loss = window_loss(self.loss)
        assert isinstance(self.loss, SeveralTerms)
        return dict(self.loss.terms(outputs, targets))

    def _of_all_ranks(self, loss: CoupledLoss, outputs: Any, targets: Any, samples: int) -> dict[str, Term]:
        parts = []
        for values in (loss.kept(outputs), targets):
            joined = WindowOutputs(self.ranks, [samples])
            joined.add(0, values)
            parts.append(joined.whole())
        return dict(loss.terms(*parts))

    def values(self, device: torch.device) -> dict[str, float] | None:
        """`loss`, and of several terms the part of each as `loss/<term>`, over all ranks.

        None if nothing counted. Waits for the device.
        """
        names = list(self._totals)
        totals = [self._totals[name] for name in names]
        weights = [self._weights[name] for name in names]
        if self.ranks.size > 1:
            sums = [
                torch.as_tensor(value, dtype=torch.float64, device=device).reshape(())
                for value in (*totals, *weights)
            ]
            numbers = self.ranks.sum(torch.stack(sums)).tolist()
            totals, weights = numbers[: len(names)], numbers[len(names) :]
        weights = [float(weight) for weight in weights]
        if not any(weights):
            return None
        parts = {
            name: self._coefficients[name] * float(total) / (weight or 1.0)
            for name, total, weight in zip(names, totals, weights, strict=True)
        }
        whole = {LOSS: sum(parts.values())}
        return whole if len(parts) == 1 else whole | {f"{LOSS}/{name}": part for name, part in parts.items()}
