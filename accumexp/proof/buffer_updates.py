"""How often a window's forward passes change a buffer, without the changes that it takes back."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .float64 import DOUBLE
from .observation import observe
from .problem import Problem, TrainingState, cast


@dataclass(frozen=True)
class BufferUpdates:
    """The changes of a buffer in the loop's first window, less those taken back.

    Attributes:
        passes: numbers of the module's forward passes that make them.
        made: number of its forward passes.
        first_size: number of samples in the window's first forward pass.
    """

    passes: list[int]
    made: int
    first_size: int

    def in_words(self) -> str:
        """In which forward passes the buffer moves; "" if that is not known."""
        if self.made < 2 or not self.passes:
            return ""
        if self.first_alone:
            return f"it moves in the first of {self.made} forward passes alone"
        if len(self.passes) == self.made:
            return f"it moves in each of {self.made} forward passes"
        return f"it moves in {len(self.passes)} of {self.made} forward passes of the first window"

    @property
    def first_alone(self) -> bool:
        return self.passes == [0] and self.made > 1


def updates_of_buffer(problem: Problem, module_name: str, buffer: str) -> BufferUpdates:
    """The changes of a module's buffer in the loop's first window."""
    state = TrainingState(problem, DOUBLE)
    module = state.inner.get_submodule(module_name)
    history: list[Tensor] = [getattr(module, buffer).detach().clone()]
    passes: list[int] = []
    made = 0

    def take_back() -> None:
        """Forgets the changes after the value that the buffer has now."""
        now = getattr(module, buffer)
        for number, value in enumerate(history):
            if torch.equal(now, value):
                del history[number + 1 :], passes[number:]
                return

    def before_forward(*_: Any) -> None:
        take_back()

    def after_forward(*_: Any) -> None:
        nonlocal made
        now = getattr(module, buffer).detach()
        if not torch.equal(now, history[-1]):
            history.append(now.clone())
            passes.append(made)
        made += 1

    with ExitStack() as hooks:
        hooks.enter_context(module.register_forward_pre_hook(before_forward))
        hooks.enter_context(module.register_forward_hook(after_forward))
        observation = observe(state, cast(problem.batches[0], DOUBLE))
    take_back()
    return BufferUpdates(passes, made, next(iter(observation.sizes), 0))
