"""How often a window's forward passes change a buffer, without the changes that it takes back."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .float64 import DOUBLE
from .observation import observe
from .problem import Problem, TrainingState, cast


def updates_of_buffer(problem: Problem, module_name: str, buffer: str) -> int:
    """The number of changes of a module's buffer in the loop's first window, less those taken back."""
    state = TrainingState(problem, DOUBLE)
    module = state.inner.get_submodule(module_name)
    history: list[Tensor] = [getattr(module, buffer).detach().clone()]

    def take_back() -> None:
        """Forgets the changes after the value that the buffer has now."""
        now = getattr(module, buffer)
        for number, value in enumerate(history):
            if torch.equal(now, value):
                del history[number + 1 :]
                return

    def before_forward(*_: Any) -> None:
        take_back()

    def after_forward(*_: Any) -> None:
        now = getattr(module, buffer).detach()
        if not torch.equal(now, history[-1]):
            history.append(now.clone())

    with ExitStack() as hooks:
        hooks.enter_context(module.register_forward_pre_hook(before_forward))
        hooks.enter_context(module.register_forward_hook(after_forward))
        observe(state, cast(problem.batches[0], DOUBLE))
    take_back()
    return len(history) - 1
