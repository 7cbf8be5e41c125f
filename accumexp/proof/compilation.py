"""Models compiled by torch.compile, observed by hooks that stay outside the compiled code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from .fixed_draws import FixedDraws

# Copies of a model that a proof compiles at most; torch compiles each again, and gives up after 8 by default.
MODELS = 128


def compile_forward(model: nn.Module) -> None:
    """Compiles `model.forward`, as `model.compile()` does where the model has no hooks.

    `model.compile()` traces the model's hooks with it: each new hook would compile the model again, until
    torch gives up and runs it eagerly. Here they run before and after the compiled code.

    torch.compile leaves alone what runs under a dispatch mode. The compiled code therefore runs outside the
    proof's modes, except while draws are held fixed: then the model runs eagerly. A copy is not compiled.
    """
    compiled = torch.compile(model.forward)

    def compiled_outside_modes(*arguments: Any, **keywords: Any) -> Any:
        if any(isinstance(mode, FixedDraws) for mode in _get_current_dispatch_mode_stack()):
            return original(*arguments, **keywords)
        with _disable_current_modes(), torch._dynamo.config.patch(recompile_limit=MODELS):
            return compiled(*arguments, **keywords)

    def call(*arguments: Any, **keywords: Any) -> Any:
        replaced = model.__dict__.get("forward")
        model.__dict__["forward"] = compiled_outside_modes
        try:
            return model._call_impl(*arguments, **keywords)
        finally:
            del model.__dict__["forward"]
            if replaced is not None:
                model.__dict__["forward"] = replaced

    original = model.forward
    model._compiled_call_impl = call  # what `model(...)` calls; copies leave it out


def outside_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook`, which torch.compile does not trace. Does not import the compiler, which takes seconds."""
    return torch.compiler.disable(hook) if "torch._dynamo" in sys.modules else hook
