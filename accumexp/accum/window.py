"""The window: the micro-batches of one update, accumulated into the gradient of the larger batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .batch import Nested, batch_size, split, split_sizes
from .buffers import Fp32Buffers
from .loss import WindowLoss, window_loss

Reduction = Literal["mean", "sum"]
Observer = Callable[[Any, Nested], None]


@dataclass(frozen=True)
class WindowResult:
    """What one window did. Tensors stay on the device: reading them is the caller's decision.

    Attributes:
        loss: mean loss over the window's items, shape (), detached.
        weight: the window's total weight (samples, or the sum of valid items' weights).
        samples: number of samples in the window.
        steps: number of micro-batches in the window.
    """

    loss: Tensor
    weight: Tensor | float
    samples: int
    steps: int


class Window:
    """Adds to `.grad` the gradient of one large batch, one micro-batch at a time.

    With `reduction="mean"` the gradient is that of `sum_i w_i l_i / sum_i w_i` over all items of the
    window, however it is split: the denominator is counted over the whole window first and every
    micro-batch divides its own sum by it. With `reduction="sum"` it is the sum of the micro-batch
    means, which is about `steps` times larger and exact only for that definition.

    Args:
        model: called as `model(x)` with a tensor, `model(*xs)` with a tuple or list, `model(**xs)`
            with a dict.
        loss: a criterion of torch, a function of (outputs, targets), or a `WindowLoss`.
        steps: micro-batches in a window.
        reduction: "mean" or "sum", as above.
        autocast: dtype of `torch.autocast` around forward and loss, or None.
        fp32_buffers: accumulate the gradients of bf16 and fp16 parameters in fp32.

    Raises:
        ValueError: for `steps` below 1 or an unknown reduction.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Any] | WindowLoss,
        steps: int,
        *,
        reduction: Reduction = "mean",
        autocast: torch.dtype | None = None,
        fp32_buffers: bool = False,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps is the number of micro-batches in a window, at least 1, not {steps}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is 'mean' or 'sum', not {reduction!r}")
        self.model = model
        self.loss = window_loss(loss)
        self.steps = steps
        self.reduction: Reduction = reduction
        self.autocast = autocast
        self._buffers = Fp32Buffers(model.parameters()) if fp32_buffers else None

    def backward(
        self, inputs: Nested, targets: Nested, *, steps: int | None = None, observe: Observer | None = None
    ) -> WindowResult:
        """Forward and backward of every micro-batch; gradients are added to `.grad`.

        Nothing here waits for the device.

        Args:
            inputs: the update's whole batch, samples first.
            targets: its targets, samples first.
            steps: micro-batches for this window alone, for example for the last one of an epoch.
            observe: called with each micro-batch's detached outputs and its targets.

        Raises:
            ValueError: if the batch has fewer samples than `steps`, or its tensors disagree in size.
        """
        steps = self.steps if steps is None else steps
        samples = batch_size((inputs, targets))
        sizes = split_sizes(samples, steps)
        weight = self.loss.weight(targets)
        share: Tensor | None = None  # of an item in the loss: 1 / weight
        total: Tensor | None = None
        if self._buffers:
            self._buffers.open()
        for inputs_k, targets_k in zip(split(inputs, sizes), split(targets, sizes), strict=True):
            with self._precision():
                outputs = call(self.model, inputs_k)
                loss_sum = self.loss.total(outputs, targets_k)
            if share is None or self.reduction == "sum":
                share = _share(weight if self.reduction == "mean" else self.loss.weight(targets_k), loss_sum)
            # The gradient of loss_sum / weight, without a division to record and to go back through.
            loss_sum.backward(share)
            detached = loss_sum.detach()
            total = detached if total is None else total + detached
            if observe is not None:
                observe(outputs.detach() if isinstance(outputs, Tensor) else outputs, targets_k)
            # Outputs must not live through the next forward: for a language model they are the peak.
            del outputs, loss_sum
        if self._buffers:
            self._buffers.close()
        assert total is not None and share is not None
        mean = total * (share if self.reduction == "mean" else _share(weight, total))
        return WindowResult(mean, weight, samples, steps)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, self.autocast)


def call(model: nn.Module, inputs: Nested) -> Any:
    """`model` on a tensor, on the items of a tuple or list, or on the named values of a dict."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _share(weight: Tensor | float, like: Tensor) -> Tensor:
    """1 / `weight`, shape (), of the dtype and device of `like`; 1 where the weight is 0.

    A window of ignored items has the gradient 0, not 0 / 0.
    """
    if not isinstance(weight, Tensor):
        return like.new_full((), 1 / (weight or 1.0))
    if weight.is_floating_point():
        return torch.where(weight == 0, 1.0, weight).to(like.dtype).reciprocal()
    return like.new_ones(()) / weight.clamp(min=1)
