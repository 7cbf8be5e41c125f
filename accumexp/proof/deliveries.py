"""What autograd delivers by micro-batch in a window that fails, and what the model's inputs are by then."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .counts import Decomposition
from .float64 import DOUBLE
from .larger_batch import Gradient, dense, dot, norm
from .nested import tensors
from .observation import observe
from .problem import TrainingState, cast


class Deliveries:
    """Hooks of a window.

    Attributes:
        passes: number of forward passes.
        gradients: what autograd has delivered after each of them and before the next one.
        overwritten: passes whose inputs are not, when a gradient arrives, what they were in the pass.
    """

    def __init__(self, state: TrainingState) -> None:
        self.passes = 0
        self.gradients: list[Gradient] = []
        self.overwritten: list[int] = []
        self.hooks = ExitStack()
        self._waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}  # inputs of passes without a gradient yet
        self.hooks.enter_context(state.inner.register_forward_hook(self._after_pass, with_kwargs=True))
        for name, parameter in state.parameters().items():
            if parameter.requires_grad:
                self.hooks.enter_context(parameter.register_hook(partial(self._arrive, name)))

    def _after_pass(self, module: Any, arguments: Any, keywords: Any, outputs: Any) -> None:
        if torch.is_grad_enabled():
            inputs = [each.detach() for each in tensors([arguments, keywords])]
            self._waiting[self.passes] = [(each, each.clone()) for each in inputs]
            self.gradients.append({})
            self.passes += 1

    def _arrive(self, name: str, gradient: Tensor) -> None:
        for number, inputs in self._waiting.items():
            if not all(torch.equal(now, then) for now, then in inputs):
                self.overwritten.append(number)
        self._waiting.clear()
        if self.gradients:
            into, exact = self.gradients[-1], dense(gradient).detach().double()
            into[name] = into[name] + exact if name in into else exact.clone()


def delivered_in_words(parts: Decomposition, state: TrainingState) -> tuple[str, list[int]]:
    """(in which micro-batches another gradient than theirs is delivered, their numbers).

    ("", []) for none, where all do, or where it is not known: each micro-batch has to be gone back through
    before the next one.

    Args:
        state: of a new loop with the weights before the window.
    """
    every = [numbers for each in parts.micro_batches for numbers in each]
    if parts.ranks > 1 or parts.problem.perturb is not None or len(every) < 2:
        return "", []
    deliveries = Deliveries(state)
    with deliveries.hooks:
        try:
            observation = observe(state, cast(parts.failure.batch, DOUBLE))
        except Exception:
            return "", []
    if observation.micro_batches != every or deliveries.passes != len(every):
        return "", []
    if deliveries.overwritten:
        places = places_in_words(deliveries.overwritten)
        return f"the inputs of micro-batch {places} are overwritten before its backward pass", []
    if not all(deliveries.gradients):
        return "", []
    pairs = zip(deliveries.gradients, parts.parts, strict=True)
    others = [number for number, (made, due) in enumerate(pairs) if not _multiple(parts, made, due)]
    if len(others) == len(every):
        return "", []
    if not others:
        text = "each micro-batch delivers its own gradient: the fault is in what the loop makes of it"
        return text, []
    places = places_in_words(others)
    return (
        f"the gradient that micro-batch {places} delivers is not that of its samples, as others' is",
        others,
    )


def _multiple(parts: Decomposition, made: Gradient, due: Gradient) -> bool:
    """Whether `made` is a multiple of `due`, over the parameters that it has."""
    due = {name: due[name].double() for name in made}
    square = dot(due, due)
    factor = dot(made, due) / square if square else 0.0
    off = {name: g - factor * due[name] for name, g in made.items()}
    return norm(off) <= parts.tolerance * norm(made)


def places_in_words(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (", ..." if len(numbers) > 6 else "")
