"""What a window differentiates: a loss of one term, of several terms, or one that couples samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .batch import Nested, batch_size
from .denominators import Denominators, as_number, reciprocal_of
from .loss import WindowLoss
from .refusals import LossRefused
from .sync import Sync
from .term_names import REMEDY, TermNames, check_counts
from .terms import CoupledLoss, SampleMean, SeveralTerms, Term, sum_of
from .two_passes import FirstPass, GivenGradients, WindowOutputs, floating
from .window_batch import WindowBatch

# The key of the window's samples among the weights; a term's name is not empty.
SAMPLES = ""


class Objective:
    """The loss of a window, micro-batch by micro-batch. Base of the kinds of loss.

    Attributes:
        passes: forward passes of every micro-batch that come before those with a backward.
    """

    passes = 0

    def prepare(self, first_pass: FirstPass) -> None:
        """Makes the passes without gradients, if any."""

    def value_and_share(self, k: int, outputs: Any, targets: Nested) -> tuple[Tensor, Tensor]:
        """A value of micro-batch `k` with a graph, and its share in the window's loss; both of shape ()."""
        raise NotImplementedError

    def backward(self, value: Tensor, start: Tensor) -> None:
        """The backward of a micro-batch, from the gradient `start` of its `value`."""
        value.backward(start)

    def add_last(self, agree: Callable[..., bool] | None) -> None:
        """Adds to `.grad` what is known after the last micro-batch alone, before ranks are added.

        `agree` is as of `Window.backward`.
        """

    def add(self, value: Tensor) -> None:
        """Adds the last micro-batch's value, after its backward; not called for padding."""

    def mean(self) -> Tensor:
        """This rank's part of the window's mean loss, shape ()."""
        raise NotImplementedError

    def terms(self) -> Mapping[str, Tensor]:
        """This rank's part of each term of the mean loss, by name."""
        return {}

    @property
    def weight(self) -> Tensor | float:
        """The window's total weight, over all ranks."""
        raise NotImplementedError

    def wait(self) -> None:
        """Waits for collectives that are pending."""


class OneTerm(Objective):
    """A loss of one term. With `by_step` each micro-batch is divided by its own weight."""

    def __init__(
        self, loss: WindowLoss, sync: Sync, batch: WindowBatch, by_step: bool, weight: float | None = None
    ) -> None:
        self.loss = loss
        self.by_step = by_step
        counted = [[targets_k] for _, targets_k in batch.parts] if by_step else [batch.targets]
        self.denominators = Denominators(loss, sync, counted, None if by_step else weight)
        self.share: Tensor | None = None  # 1 / weight, the factor of an item's loss
        self.total: Tensor | None = None

    def value_and_share(self, k: int, outputs: Any, targets: Nested) -> tuple[Tensor, Tensor]:
        loss_sum = self.loss.total(outputs, targets)
        if self.share is None or self.by_step:
            self.share = reciprocal_of(self.denominators.of(k), loss_sum)
        # The gradient of loss_sum / weight, without a division in the graph.
        return loss_sum, self.share

    def add(self, value: Tensor) -> None:
        self.total = value if self.total is None else self.total + value

    def mean(self) -> Tensor:
        assert self.share is not None
        total = torch.zeros_like(self.share) if self.total is None else self.total
        return total * (reciprocal_of(self.denominators.total, total) if self.by_step else self.share)

    @property
    def weight(self) -> Tensor | float:
        return self.denominators.total

    def wait(self) -> None:
        self.denominators.wait()


class SeveralDenominators(Objective):
    """A loss of several terms: `sum_t c_t * total_t / weight_t`, each weight that of the whole window.

    The weights of means over samples, and those that the loss counts from the targets, are known before the
    first forward pass. The others are late: their sums are taken in a pass without gradients.
    """

    def __init__(self, loss: SeveralTerms, sync: Sync, batch: WindowBatch) -> None:
        self.loss = loss
        self.sync = sync
        self.batch = batch
        self.passes = 0 if loss.late == () else 1
        self._device = next(sync.module.parameters()).device
        self._dtype = torch.float32  # of the totals
        self._totals: dict[str, Tensor] = {}  # by term: of this rank, detached
        self._latest: Mapping[str, Term] = {}
        self._late_totals: dict[str, Tensor] = {}  # of late terms, over all ranks
        counted: dict[str, Tensor | float] = {}
        for targets in batch.targets:
            for name, weight in loss.weights(targets).items():
                counted[name] = counted[name] + weight if name in counted else weight
        self._names = TermNames(loss, sync.ranks, list(counted))
        self._weights = self._over_ranks({SAMPLES: float(sum(batch.sizes)), **counted})

    def prepare(self, first_pass: FirstPass) -> None:
        sums: dict[str, Tensor | float] = {}
        first = self.loss.names is None

        def add(k: int, outputs: Any, targets: Nested) -> None:
            terms = self.loss.terms(outputs, targets)
            if not self.batch.sizes[k]:
                return
            late = self._late_of(terms)
            self._names.add(terms, late)
            for name in [name for name in terms if name in self._names.counted or name in late]:
                for kind, number in (("total", terms[name].total), ("weight", terms[name].weight)):
                    sums[f"{kind} {name}"] = sums.get(f"{kind} {name}", 0.0) + number

        first_pass.run(add)
        if first or self._names.late:
            first_pass.agree()
        self._names.agree()
        late = self._names.late
        counted = self._names.counted if first else []
        added = [*late, *counted]
        if not added:
            return
        keys = [f"{kind} {name}" for name in added for kind in ("total", "weight")]
        summed = self._over_ranks({key: sums.get(key, 0.0) for key in keys})
        returned = {name: summed[f"weight {name}"] for name in counted}
        check_counts({name: self._weights[name] for name in counted}, returned)
        for name in late:
            self._weights[name] = summed[f"weight {name}"]
            self._late_totals[name] = torch.as_tensor(summed[f"total {name}"])

    def value_and_share(self, k: int, outputs: Any, targets: Nested) -> tuple[Tensor, Tensor]:
        terms = self._terms_of(k, outputs, targets)
        values = []
        for name, term in terms.items():
            total = term.total.reshape(())
            self._dtype = total.dtype
            factor = term.coefficient * self._reciprocal(name, term, total)
            values.append(total * factor)
            if isinstance(term.weight, Tensor) and term.weight.requires_grad and name in self._late_totals:
                # The derivative of total / weight by the weight is -total / weight^2.
                slope = -self._late_totals[name].to(total.dtype) * self._reciprocal(name, term, total)
                weight = term.weight.reshape(())
                values.append((weight - weight.detach()) * slope * factor)
        self._latest = terms
        value = sum(values[1:], values[0])
        return value, torch.ones_like(value)

    def add(self, value: Tensor) -> None:
        for name, term in self._latest.items():
            total = term.total.detach().reshape(())
            part = total * (term.coefficient * self._reciprocal(name, term, total))
            self._totals[name] = self._totals[name] + part if name in self._totals else part
        self._latest = {}

    def mean(self) -> Tensor:
        return _sum(self.terms().values())

    def terms(self) -> Mapping[str, Tensor]:
        # A rank of padding alone has no totals, and adds zeros to the others'.
        zero = torch.zeros((), dtype=self._dtype, device=self._device)
        return {name: self._totals.get(name, zero.clone()) for name in self.loss.names or ()}

    @property
    def weight(self) -> Tensor | float:
        return self._weights[SAMPLES]

    def _terms_of(self, k: int, outputs: Any, targets: Nested) -> Mapping[str, Term]:
        """The terms of micro-batch `k`, in a pass with backward."""
        terms = self.loss.terms(outputs, targets)
        self._names.check_coefficients(terms)
        if not self.passes and self.batch.sizes[k]:
            self._names.add(terms, self._late_of(terms))
        return terms

    def add_last(self, agree: Callable[..., bool] | None) -> None:
        if not self.passes:
            self._names.agree()

    def _late_of(self, terms: Mapping[str, Term]) -> list[str]:
        """Those of `terms` whose weights are not known yet."""
        return [name for name, term in terms.items() if self._key(name, term) not in self._weights]

    def _key(self, name: str, term: Term) -> str:
        return SAMPLES if isinstance(term, SampleMean) else name

    def _reciprocal(self, name: str, term: Term, like: Tensor) -> Tensor:
        key = self._key(name, term)
        if key not in self._weights:
            raise LossRefused(f"the loss returned a term {name!r} that it did not return before: {REMEDY}")
        return reciprocal_of(self._weights[key], like)

    def _over_ranks(self, sums: Mapping[str, Tensor | float]) -> dict[str, Tensor | float]:
        """`sums`, added over the ranks in one collective."""
        if self.sync.ranks.size == 1:
            return dict(sums)
        numbers = [as_number(value, self._device) for value in sums.values()]
        return dict(zip(sums, self.sync.ranks.sum(torch.stack(numbers)).unbind(), strict=True))


class Coupled(Objective):
    """A loss that couples the samples of a window.

    A pass without gradients gives all outputs of the window, over all ranks; the loss on them gives their
    gradient, from which each micro-batch's backward starts (the gradient cache of Gao et al. 2021,
    arXiv:2101.06983). Every rank computes the loss of all outputs.
    """

    passes = 1

    def __init__(self, loss: CoupledLoss, sync: Sync, batch: WindowBatch) -> None:
        self.loss = loss
        self.ranks = sync.ranks
        self.batch = batch
        self._samples: float = 0.0
        self._gradients: list[list[Tensor]] = []  # by micro-batch: of its floating-point outputs
        self._terms: dict[str, Tensor] = {}

    def prepare(self, first_pass: FirstPass) -> None:
        outputs, targets = (WindowOutputs(self.ranks, self.batch.sizes) for _ in range(2))

        def add(k: int, outputs_k: Any, targets_k: Nested) -> None:
            outputs.add(k, self.loss.kept(outputs_k))
            targets.add(k, targets_k)

        first_pass.run(add)
        first_pass.agree()
        with torch.enable_grad(), first_pass.precision():
            whole, all_targets = outputs.whole(requires_grad=True), targets.whole()
            terms = self.loss.terms(whole, all_targets)
            sum_of(terms).backward()
        self._samples = float(batch_size(all_targets))
        self._gradients = outputs.gradients()
        self._terms = {
            name: term.value.detach().reshape(()) / self.ranks.size for name, term in terms.items()
        }

    def value_and_share(self, k: int, outputs: Any, targets: Nested) -> tuple[Tensor, Tensor]:
        leaves = floating(self.loss.kept(outputs))
        # Of padding there is none: its backward starts from 0.
        gradients = self._gradients[k] if self.batch.sizes[k] else [torch.zeros_like(leaf) for leaf in leaves]
        value: Tensor = GivenGradients.apply(len(leaves), *leaves, *gradients)  # type: ignore[assignment]
        return value, torch.ones_like(value)

    def mean(self) -> Tensor:
        return _sum(self._terms.values())

    def terms(self) -> Mapping[str, Tensor]:
        return self._terms if len(self._terms) > 1 else {}

    @property
    def weight(self) -> Tensor | float:
        return self._samples


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """The sum of `parts`, in memory of its own: a window adds it and them over the ranks, in place."""
    first, *others = parts
    return sum(others, first.clone())
