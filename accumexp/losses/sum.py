"""A loss that is a weighted sum of others, each on its part of the outputs and targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..accum.loss import window_loss
from ..accum.terms import CoupledLoss, SeveralTerms, Term, sum_of

PARTS = ("loss", "coefficient", "output", "target")


class _Part(NamedTuple):
    name: str
    loss: Any
    coefficient: float
    output: str | int | None
    target: str | int | None

    def of(self, outputs: Any) -> Any:
        return outputs if self.output is None else self._taken(outputs, "output", self.output)

    def of_targets(self, targets: Any) -> Any:
        return targets if self.target is None else self._taken(targets, "target", self.target)

    def _taken(self, values: Any, kind: str, key: str | int) -> Any:
        try:
            return values[key]
        except (KeyError, IndexError, TypeError) as error:
            there = ", ".join(map(str, values)) if hasattr(values, "keys") else type(values).__name__
            raise ValueError(f"terms.{self.name}.{kind}={key}: is not in the {kind}s ({there})") from error


class Sum(nn.Module):
    """`sum_t coefficient_t * loss_t`, each term with its own denominator over the window and all ranks.

    If a term couples samples, all are computed on the outputs of the whole window.

    Args:
        terms: by name, mappings of `loss` (any loss that a window takes), and optionally `coefficient` (1),
            and `output` and `target`: the key or position of its part of the model's outputs and of the
            targets (all of them).

    Raises:
        ValueError: naming the term that is none, or a sum over samples, which has no denominator.
    """

    def __init__(self, terms: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        if not terms:
            raise ValueError("terms: at least one is needed")
        self._parts = {name: _part(name, given) for name, given in terms.items()}
        # Registered, so that class weights move to the device.
        self.losses = nn.ModuleList(p.loss for p in self._parts.values() if isinstance(p.loss, nn.Module))
        self.couples = any(getattr(part.loss, "couples", False) for part in self._parts.values())

    def weights(self, targets: Any) -> dict[str, Tensor | float]:
        """The weights that depend on the targets alone, by term."""
        weights: dict[str, Tensor | float] = {}
        for name, part in self._parts.items():
            part_targets = part.of_targets(targets)
            if isinstance(part.loss, SeveralTerms):
                weights.update({_inner(name, key): w for key, w in part.loss.weights(part_targets).items()})
            elif not isinstance(part.loss, CoupledLoss):
                weights[name] = part.loss.weight(part_targets)
        return weights

    def terms(self, outputs: Any, targets: Any) -> dict[str, Term]:
        """The terms of a batch by name; a loss of several terms gives `<name>/<its term>`."""
        terms: dict[str, Term] = {}
        for name, part in self._parts.items():
            loss, own_outputs, part_targets = part.loss, part.of(outputs), part.of_targets(targets)
            if isinstance(loss, SeveralTerms | CoupledLoss):
                for key, term in loss.terms(own_outputs, part_targets).items():
                    coefficient = term.coefficient * part.coefficient
                    terms[_inner(name, key)] = term._replace(coefficient=coefficient)
                continue
            total = loss.total(own_outputs, part_targets)
            if getattr(loss, "returns_terms", False):
                raise ValueError(f"terms.{name}: returns several terms, give them one by one")
            terms[name] = Term(total.reshape(()), loss.weight(part_targets), part.coefficient)
        return terms

    def kept(self, outputs: Any) -> Any:
        """The outputs that the terms take, by their keys; all of them if a term takes all."""
        keys = dict.fromkeys(part.output for part in self._parts.values())
        return outputs if None in keys else {key: outputs[key] for key in keys}

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of one batch, shape ()."""
        return sum_of(self.terms(outputs, targets))


def _part(name: str, given: Any) -> _Part:
    if not isinstance(given, Mapping) or "loss" not in given:
        raise ValueError(f"terms.{name}: a mapping of {', '.join(PARTS)} is needed, loss at least")
    if unknown := [key for key in given if key not in PARTS]:
        raise ValueError(f"terms.{name}.{unknown[0]}: unknown, a term has {', '.join(PARTS)}")
    loss = window_loss(given["loss"])
    if not getattr(loss, "counts", True):
        raise ValueError(f"terms.{name}: a sum over samples has no denominator, give reduction=mean")
    try:
        coefficient = float(given.get("coefficient", 1.0))
    except (TypeError, ValueError) as error:
        raise ValueError(f"terms.{name}.coefficient={given['coefficient']}: a number is needed") from error
    return _Part(name, loss, coefficient, given.get("output"), given.get("target"))


def _inner(name: str, key: str) -> str:
    return name if key == "loss" else f"{name}/{key}"
