"""Losses of several terms, each with its own denominator, and losses that couple the samples of a batch.

The larger batch's loss is `sum_t c_t * (sum of term t's totals) / (sum of its weights)` over the window's
micro-batches and ranks. A loss that couples samples (`couples = True`) has no such sums: its value is that of
the loss on all outputs of the window at once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .batch import Nested, batch_size
from .refusals import LossRefused


class Term(NamedTuple):
    """A term of a loss on one batch: `coefficient * total / weight`.

    Attributes:
        total: the sum of the items' weighted losses, shape ().
        weight: the sum of the items' weights, a number or shape (); gradients flow through it.
        coefficient: a constant factor, the same in every micro-batch.
    """

    total: Tensor
    weight: Tensor | float
    coefficient: float = 1.0

    @property
    def value(self) -> Tensor:
        """`coefficient * total / weight`, shape (); 0 if the weight is 0."""
        weight = torch.as_tensor(self.weight, dtype=self.total.dtype, device=self.total.device)
        return self.coefficient * self.total / torch.where(weight == 0, 1.0, weight)


class SampleMean(Term):
    """A term that is a mean over the samples of the batch: its weight is their number."""


@runtime_checkable
class TermsLoss(Protocol):
    """A loss of several terms.

    A class may also have `weights(targets)`, a mapping of the weights that depend on the targets alone. These
    are counted before the first forward pass; the others are counted in a forward pass of their own.
    """

    def terms(self, outputs: Any, targets: Any, /) -> Mapping[str, Term]:
        """The terms of a batch by name, the same names in every batch."""
        ...


class _Terms(nn.Module):
    """Base of the losses of several terms that wrap a criterion.

    `weight` and `total` make them usable where one batch is evaluated by itself.
    """

    counts = True
    couples = False
    returns_terms = False  # of a loss that is taken as a mean over samples

    def __init__(self, criterion: Any) -> None:
        super().__init__()
        self.criterion: Any = criterion

    def terms(self, outputs: Any, targets: Any) -> Mapping[str, Term]:
        raise NotImplementedError

    def weight(self, targets: Nested) -> float:
        return float(batch_size(targets))

    def total(self, outputs: Any, targets: Nested) -> Tensor:
        return sum_of(self.terms(outputs, targets)) * batch_size(targets)


class SeveralTerms(_Terms):
    """A criterion with a method `terms`, or a function that returns a mapping by name.

    A tensor in the mapping is a mean over the samples of the batch, with the coefficient 1; anything else is
    a `Term`.
    """

    def __init__(self, criterion: Any) -> None:
        super().__init__(criterion)
        # All terms, and those whose weights depend on the outputs; None before the first window.
        self.names: tuple[str, ...] | None = None
        self.late: tuple[str, ...] | None = None

    def weights(self, targets: Any) -> Mapping[str, Tensor | float]:
        """The weights that depend on the targets alone, by term.

        Raises:
            ValueError: for a weight that is not one number.
        """
        counted = getattr(self.criterion, "weights", None)
        weights = {} if counted is None else counted(targets)
        return {name: _one_weight(name, weight) for name, weight in weights.items()}

    def terms(self, outputs: Any, targets: Any) -> Mapping[str, Term]:
        terms = getattr(self.criterion, "terms", self.criterion)
        return as_terms(terms(outputs, targets), targets)


class CoupledLoss(_Terms):
    """A criterion whose loss of one sample depends on the others (`couples = True`).

    Its value on a batch is a tensor of shape (), or a mapping of terms. A criterion may have a method
    `kept(outputs)`, the part of a micro-batch's outputs that it needs, in a form in which it takes them too.
    """

    couples = True

    def kept(self, outputs: Any) -> Any:
        """The outputs of a micro-batch that the loss of the window needs."""
        kept = getattr(self.criterion, "kept", None)
        return outputs if kept is None else kept(outputs)

    def terms(self, outputs: Any, targets: Any) -> Mapping[str, Term]:
        value = getattr(self.criterion, "terms", self.criterion)(outputs, targets)
        if isinstance(value, Tensor):
            value = {"loss": value}
        return as_terms(value, targets)


def as_terms(value: Any, targets: Any) -> dict[str, Term]:
    """`value`, as a criterion returned it, as terms by name.

    Raises:
        ValueError: for a value that is no mapping of terms and of tensors with one element.
    """
    if not isinstance(value, Mapping) or not value:
        kind = "an empty mapping" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        raise LossRefused(f"a loss of several terms returns a mapping of terms by name, not {kind}")
    terms = {}
    for name, term in value.items():
        if isinstance(term, Tensor):
            count = batch_size(targets)
            term = SampleMean(_wide(term) * count, float(count))
        if not isinstance(term, Term):
            raise LossRefused(f"term {name!r} is a {type(term).__name__}: a tensor or a Term is needed")
        if not isinstance(term.total, Tensor):
            kind = type(term.total).__name__
            raise LossRefused(f"term {name!r} has a total that is a {kind}: a tensor is needed")
        if term.total.numel() != 1:
            shape = tuple(term.total.shape)
            raise LossRefused(f"term {name!r} has a total of shape {shape}: one number is needed")
        terms[str(name)] = term._replace(total=_wide(term.total), weight=_one_weight(name, term.weight))
    return terms


def _wide(total: Tensor) -> Tensor:
    """`total` as a floating-point number of fp32 or more: it is divided by the weight of a window."""
    if not total.is_floating_point():
        return total.to(torch.get_default_dtype())
    return total.float() if total.element_size() < 4 else total


def _one_weight(name: object, weight: Tensor | float) -> Tensor | float:
    """`weight`, where it is one number; a bool as an integer, because bools add up to a bool."""
    if not isinstance(weight, Tensor):
        return weight
    if weight.numel() != 1:
        shape = tuple(weight.shape)
        raise LossRefused(f"term {name!r} has a weight of shape {shape}: their sum is needed")
    return weight.long() if weight.dtype is torch.bool else weight


def sum_of(terms: Mapping[str, Term]) -> Tensor:
    """The loss of one batch: the sum of its terms' values, shape ()."""
    values = [term.value.reshape(()) for term in terms.values()]
    return sum(values[1:], values[0])


def has_terms(loss: Any) -> bool:
    """Whether `loss` has several terms, or couples samples; of a function, whether it was seen to have."""
    return isinstance(loss, _Terms) or getattr(loss, "returns_terms", False)


def couples_samples(criterion: Any) -> bool:
    """Whether `criterion`, or the function that it is a partial of, declares `couples = True`."""
    while isinstance(criterion, functools.partial):
        criterion = criterion.func
    return bool(getattr(criterion, "couples", False))


def terms_loss(criterion: Any) -> _Terms | None:
    """`criterion` as a loss of several terms, or None if it does not declare to be one."""
    if isinstance(criterion, _Terms):
        return criterion
    if couples_samples(criterion):
        return CoupledLoss(criterion)
    return SeveralTerms(criterion) if isinstance(criterion, TermsLoss) else None
