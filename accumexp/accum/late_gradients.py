"""One gradient for each term whose weight is known last, in place of a pass without gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .batch import Nested
from .denominators import reciprocal_of
from .objective import SeveralDenominators
from .sync import Sync
from .terms import SeveralTerms, Term
from .window_batch import WindowBatch


class OneGradientPerTerm(SeveralDenominators):
    """A loss of several terms whose late weights are counted in the passes with backward.

    Each late term's gradient is accumulated by itself, and divided by its weight after the last micro-batch:
    a buffer of the size of the gradient for each of them, two if its weight has a gradient. A micro-batch has
    a backward for each buffer, and one for the other terms.
    """

    def __init__(self, loss: SeveralTerms, sync: Sync, batch: WindowBatch) -> None:
        super().__init__(loss, sync, batch)
        self.passes = 0
        self._parameters = [p for p in sync.module.parameters() if p.requires_grad]
        self._late: dict[str, Term] = {}  # of the present micro-batch
        # By term and "total" or "weight": this rank's sum and the sum of its gradients.
        self._numbers: dict[tuple[str, str], Tensor] = {}
        self._gradients: dict[tuple[str, str], list[Tensor | None]] = {}
        self._coefficients: dict[str, float] = {}

    def value_and_share(self, k: int, outputs: object, targets: Nested) -> tuple[Tensor, Tensor]:
        terms = self._terms_of(k, outputs, targets)
        late = {name: terms[name] for name in self._late_of(terms)}
        self._late = late
        self._latest = {name: term for name, term in terms.items() if name not in late}
        first = next(iter(terms.values())).total.reshape(())
        self._dtype = first.dtype
        values = [
            term.total.reshape(()) * (term.coefficient * self._reciprocal(name, term, first))
            for name, term in self._latest.items()
        ]
        value = sum(values[1:], values[0]) if values else torch.zeros_like(first)
        return value, torch.ones_like(first)

    def backward(self, value: Tensor, start: Tensor) -> None:
        for name, term in self._late.items():
            self._coefficients[name] = term.coefficient
            weight = torch.as_tensor(term.weight, dtype=term.total.dtype, device=term.total.device)
            for kind, number in (("total", term.total), ("weight", weight)):
                number, key = number.reshape(()), (name, kind)
                before = self._numbers.get(key, torch.zeros_like(number.detach()))
                # `start` is 0 for padding, whose numbers do not count.
                self._numbers[key] = before + number.detach() * (start != 0)
                if number.requires_grad:
                    self._accumulate(key, number, start)
        self._late = {}
        if value.requires_grad:
            value.backward(start)

    def _accumulate(self, key: tuple[str, str], number: Tensor, start: Tensor) -> None:
        gradients = torch.autograd.grad(
            number, self._parameters, start.to(number.dtype), retain_graph=True, allow_unused=True
        )
        sums = self._gradients.setdefault(key, [None] * len(gradients))
        for index, gradient in enumerate(gradients):
            before = sums[index]
            if before is None:
                sums[index] = gradient
            elif gradient is not None:
                before.add_(gradient)

    def add_last(self, agree: Callable[..., bool] | None) -> None:
        """Divides the late terms' gradients by their weights over all ranks, and adds them to `.grad`."""
        if agree is not None and (self.loss.names is None or self._names.late):
            agree(False, more=True)
        self._names.agree()
        keys = [(name, kind) for name in self._names.late for kind in ("total", "weight")]
        if not keys:
            return
        # A rank may lack a term.
        none = torch.zeros((), dtype=self._dtype, device=self._device)
        numbers = {key: self._numbers.get(key, none) for key in keys}
        summed = self._over_ranks({f"{kind} {name}": numbers[name, kind] for name, kind in keys})
        for name in self._names.late:
            weight, rank_total = summed[f"weight {name}"], numbers[name, "total"]
            total = torch.as_tensor(summed[f"total {name}"]).to(rank_total)
            self._weights[name] = weight
            share = self._coefficients.get(name, 0.0) * reciprocal_of(weight, rank_total)
            self._totals[name] = rank_total * share
            # The derivative of total / weight by the weight is -total / weight^2.
            self._add((name, "total"), share)
            self._add((name, "weight"), -total * share * reciprocal_of(weight, rank_total))
        self._gradients.clear()

    def _add(self, key: tuple[str, str], factor: Tensor) -> None:
        for parameter, gradient in zip(self._parameters, self._gradients.get(key, []), strict=False):
            if gradient is None:
                continue
            gradient.mul_(factor.to(gradient.dtype))
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)
