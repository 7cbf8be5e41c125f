"""Calls of torch's own functions that clip gradients or step an optimizer through a loss scaler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from .audit_records import FitRecord

# Inner functions first: loops import the public ones by name, before they could be replaced.
CLIPPING = ("_clip_grads_with_norm_", "clip_grad_value_")


@contextmanager
def clipping_calls(before: Callable[[list[Tensor]], None]) -> Iterator[None]:
    """Calls `before` with the parameters whose gradients torch.nn.utils is about to clip."""

    def observed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(parameters: Any, *arguments: Any, **keywords: Any) -> Any:
            parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            before(parameters)
            return function(parameters, *arguments, **keywords)

        return call

    with ExitStack() as stack:
        for name in CLIPPING:
            if (function := getattr(clip_grad, name, None)) is None:
                continue
            for module in (clip_grad, torch.nn.utils):
                if getattr(module, name, None) is function:
                    stack.enter_context(patch.object(module, name, observed(function)))
        yield


@contextmanager
def scaler_steps(skipped: Callable[[torch.optim.Optimizer], None], record: FitRecord) -> Iterator[None]:
    """Calls `skipped` after a step of torch.amp.GradScaler that did not step its optimizer."""
    scaler_class = torch.amp.GradScaler  # pyright: ignore[reportPrivateImportUsage]
    original = scaler_class._maybe_opt_step

    def step(self: Any, optimizer: Any, *arguments: Any, **keywords: Any) -> Any:
        record.scaled = True
        stepped: list[bool] = []
        handle = optimizer.register_step_pre_hook(lambda *_: stepped.append(True))
        try:
            return original(self, optimizer, *arguments, **keywords)
        finally:
            handle.remove()
            if not stepped:
                skipped(optimizer)

    with patch.object(scaler_class, "_maybe_opt_step", step):
        yield
