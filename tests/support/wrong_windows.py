"""Windows that are wrong on purpose, as callbacks: accuracy alone would not tell them from right ones."""

from __future__ import annotations

from typing import Any

import torch

from accumexp.accum import WindowResult, split, split_sizes
from accumexp.accum.batch import batch_size
from accumexp.training.callbacks import Callback
from accumexp.training.trainer import Trainer


class HalfRate(Callback):
    """Half the learning rate wherever a window has more than one micro-batch."""

    def run_begin(self, trainer: Trainer) -> None:
        if trainer.window.steps > 1:
            trainer.scheduler.base_lrs = [rate / 2 for rate in trainer.scheduler.base_lrs]
            for group in trainer.optimizer.param_groups:
                group["lr"] /= 2


class MeanOfMeans(Callback):
    """Every micro-batch's mean counts alike, whatever its number of samples."""

    def run_begin(self, trainer: Trainer) -> None:
        window = trainer.window

        def backward(
            inputs: Any, targets: Any, *, steps: int, samples: int, observe: Any, **_: Any
        ) -> WindowResult:
            sizes = split_sizes(batch_size(targets), steps)
            total: Any = 0.0
            for inputs_k, targets_k in zip(split(inputs, sizes), split(targets, sizes), strict=True):
                outputs = window.model(inputs_k)
                loss = window.loss.total(outputs, targets_k) / window.loss.weight(targets_k) / steps
                loss.backward()
                total = total + loss.detach()
                if observe is not None:
                    observe(outputs.detach(), targets_k)
            return WindowResult(total, float(samples), samples, steps)

        window.backward = backward  # type: ignore[method-assign]


class TripledInFp32(Callback):
    """Three times the gradient, but not in float64."""

    def run_begin(self, trainer: Trainer) -> None:
        def triple(optimizer: Any, *_: Any) -> None:
            for parameter in trainer.model.parameters():
                if parameter.grad is not None and parameter.dtype is not torch.float64:
                    parameter.grad *= 3

        trainer.optimizer.register_step_pre_hook(triple)
