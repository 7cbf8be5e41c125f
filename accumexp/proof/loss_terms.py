"""The proof's own reading of losses of several terms, and of losses that couple the samples of a batch.

A loss of several terms is `sum_t c_t * (sum of term t's totals) / (sum of its weights)`. It is an object with
`terms(outputs, targets)`, or a function that returns a mapping by name: of tensors, which are means over
samples, and of named tuples with `total`, `weight` and `coefficient`. A loss that couples samples has an
attribute `couples` that is true: its value is that of the whole batch's outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """A term of a loss on one batch.

    Attributes:
        total: the sum of the items' losses, shape (); the term's mean where `weight` is None.
        weight: the sum of the items' weights, a number or shape (); None for a mean over samples.
        coefficient: a constant factor.
    """

    total: Tensor
    weight: Tensor | float | None
    coefficient: float = 1.0

    @property
    def value(self) -> Tensor:
        """The term's part of the batch's loss, shape (); 0 if the weight is 0."""
        if self.weight is None:
            return self.coefficient * self.total
        total = _wide(self.total)
        weight = torch.as_tensor(self.weight, dtype=total.dtype, device=total.device)
        return self.coefficient * total / torch.where(weight == 0, 1.0, weight)

    def sums(self, samples: int) -> tuple[Tensor, Tensor]:
        """(total, weight) of `samples` samples, which add up over parts of a batch; detached, shape ()."""
        total = _wide(self.total.detach())
        if self.weight is None:
            return total * samples, torch.as_tensor(float(samples), dtype=total.dtype, device=total.device)
        return total, torch.as_tensor(self.weight, dtype=total.dtype, device=total.device).detach()


def _wide(total: Tensor) -> Tensor:
    """`total` in fp32 at least: bf16 has no number between 256 and 258."""
    return total.to(torch.promote_types(total.dtype, torch.float32))


def couples(loss: Any) -> bool:
    """Whether `loss`, or the function that a partial calls, declares that it couples samples."""
    return bool(getattr(_function(loss), "couples", False))


def name_of(loss: Any) -> str:
    """The name of the function that `loss` is or calls, or of its class."""
    return getattr(_function(loss), "__name__", type(loss).__name__)


def _function(loss: Any) -> Any:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss


def declares_terms(loss: Any) -> bool:
    """Whether `loss` has a method `terms`; a function may return terms without that."""
    return callable(getattr(loss, "terms", None))


def by_terms(loss: Any) -> Callable[..., Any]:
    """What of `loss` is called with outputs and targets: its method `terms`, or itself."""
    return loss.terms if declares_terms(loss) else loss


def read_terms(value: Any) -> dict[str, Term]:
    """The terms in what a loss returned; empty for a loss of one term.

    Raises:
        ValueError: for a term that is neither a tensor with one element nor has a total and a weight.
    """
    if not isinstance(value, Mapping):
        return {}
    return {str(name): _read(str(name), term) for name, term in value.items()}


def _read(name: str, term: Any) -> Term:
    if not isinstance(term, Tensor) and not (hasattr(term, "total") and hasattr(term, "weight")):
        raise ValueError(f"loss: term {name!r} is a {type(term).__name__}, not a tensor and without a total")
    mean = isinstance(term, Tensor)
    total = term if mean else torch.as_tensor(term.total)
    if total.numel() != 1:
        raise ValueError(f"loss: term {name!r} has shape {tuple(total.shape)}, one number is needed")
    if mean:
        return Term(total.reshape(()), None)
    weight = term.weight.reshape(()) if isinstance(term.weight, Tensor) else float(term.weight)
    return Term(total.reshape(()), weight, float(getattr(term, "coefficient", 1.0)))


def sum_of(terms: Mapping[str, Term]) -> Tensor:
    """The loss of a batch: the sum of its terms' values, shape ()."""
    return torch.stack([term.value for term in terms.values()]).sum()
