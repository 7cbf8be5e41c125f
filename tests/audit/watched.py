"""A stand-in for the watch of an audit: counts what a fit trains, and compares nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from accumexp.audit.settings import Module, Setting


class CountingWatch:
    """Counts the samples of every micro-batch, by update.

    Attributes:
        updates: the sizes of the micro-batches that each optimizer step follows.
        rates: the learning rates of the parameter groups in each update.
        losses: that the fit reports.
        samples: the sum of each sample's inputs, in the order of training; padding adds nothing to it.
        dtype: that the fit is to train in; `trained` is what it did.
    """

    def __init__(self) -> None:
        self.dtype = torch.float64
        self.trained: torch.dtype | None = None
        self.updates: list[list[int]] = []
        self.rates: list[list[float]] = []
        self.losses: list[float] = []
        self.samples: list[float] = []
        self._sizes: list[int] = []

    def __call__(self, model: Module) -> Module:
        model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.trained = next(model.parameters()).dtype
        return model

    def loss(self, value: float) -> None:
        self.losses.append(value)

    def _count(self, module: nn.Module, arguments: Any, keywords: Any) -> None:
        if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:  # not within a backward
            inputs = arguments[0] if arguments else next(iter(keywords.values()))
            self._sizes.append(len(inputs))
            self.samples.extend(inputs.double().sum(1).tolist())

    def _step(self, optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> Any:
        closure = arguments[1] if len(arguments) > 1 else keywords.get("closure")
        if closure is None:
            self._end(optimizer)
            return None

        def counted() -> Any:
            value = closure()
            self._end(optimizer)
            return value

        return (arguments[0], counted), {}

    def _end(self, optimizer: torch.optim.Optimizer) -> None:
        self.updates.append(self._sizes)
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self._sizes = []


def watched(adapter: Any, setting: Setting, steps: int, micro: int) -> CountingWatch:
    """Runs the adapter's fit under a `CountingWatch`."""
    watch = CountingWatch()
    handle = register_optimizer_step_pre_hook(watch._step)
    try:
        adapter.fit(setting, watch, steps, micro)
    finally:
        handle.remove()
    return watch
