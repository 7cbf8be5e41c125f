"""The window: the micro-batches of one update, accumulated into the gradient of the larger batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .batch import Nested, batch_size, map_tensors, split, split_sizes
from .buffers import Fp32Buffers
from .loss import WindowLoss, window_loss
from .scale import LossScale
from .sync import NOTHING, sync_of
from .weights import Weights, share_of

Reduction = Literal["mean", "sum"]
Observer = Callable[[Any, Nested], None]


@dataclass(frozen=True)
class MicroBatch:
    """What is known of a micro-batch right after its backward, on this rank.

    `.grad` has then grown by its part of the gradient: the sum of its items' weighted losses, times `share`,
    times `Window.loss_scale` and `Window.sync.factor` where there are any. After the `last` one of several
    ranks it holds the sum over all of them instead.

    Attributes:
        number: from 0.
        last: whether the window ends with it.
        samples: this rank's samples in it; 0 where it was padding, whose gradient is 0.
        targets: theirs; `Window.loss.weight(targets)` is what they weigh.
        share: of a unit of weight in the loss, shape (): 1 / the window's weight, or with
            `reduction="sum"` 1 / the micro-batch's.
    """

    number: int
    last: bool
    samples: int
    targets: Nested
    share: Tensor


@dataclass(frozen=True)
class WindowResult:
    """What one window did. Tensors stay on the device: reading them is the caller's decision.

    Attributes:
        loss: mean loss over the window's items, on all ranks, shape (), detached; with `local_loss`
            this rank's part of it, and the parts of all ranks add up to the mean.
        weight: the window's total weight (samples, or the sum of valid items' weights), over all ranks.
        samples: number of this rank's samples in the window.
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
    means, which is about `steps` times larger and exact only for that definition; a micro-batch's mean
    is then over its parts on all ranks.

    A model that was wrapped for several ranks (`data_parallel`, `fully_sharded`, torch's own
    DistributedDataParallel and `fully_shard`) makes one window of all ranks' samples: each rank calls
    `backward` with its own, weights are counted over the ranks before the first backward, and gradients
    are added over the ranks in the last micro-batch alone.

    Args:
        model: called as `model(x)` with a tensor, `model(*xs)` with a tuple or list, `model(**xs)`
            with a dict.
        loss: a criterion of torch, a function of (outputs, targets), or a `WindowLoss`.
        steps: micro-batches in a window, on each rank.
        reduction: "mean" or "sum", as above.
        autocast: dtype of `torch.autocast` around forward and loss, or None.
        fp32_buffers: accumulate the gradients of bf16 and fp16 parameters in fp32.
        loss_scale: multiplies the loss before each backward; `OptimizerStep` divides the gradient by it.
        reduce_every_micro_batch: of a fully sharded model, reduce-scatter in every micro-batch: more
            communication, and no unsharded gradient is kept between micro-batches.
        local_loss: leave the loss of the other ranks out of the result, and save a collective.

    Attributes:
        model: the model without what wraps it.
        sync: how the ranks become one.
        after_micro_batch: called with a `MicroBatch` right after each one's backward, in this order.
            Gradients are there to be looked at, unless fp32 buffers or shards keep them elsewhere. What
            is called must neither change them nor wait for the device.
        forgotten: called when a window that was under way is given up, to begin again: what was observed of
            it has not happened.
        under_way: the number of the micro-batch that is computing, or was the last.

    Raises:
        ValueError: for `steps` below 1, an unknown reduction, or fp32 buffers of a fully sharded model.
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
        loss_scale: LossScale | None = None,
        reduce_every_micro_batch: bool = False,
        local_loss: bool = False,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps is the number of micro-batches in a window, at least 1, not {steps}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is 'mean' or 'sum', not {reduction!r}")
        self.sync = sync_of(model, reduce_every_micro_batch)
        if fp32_buffers and self.sync.sharded:
            raise ValueError("fp32_buffers: gradients of a fully sharded model are not there to collect")
        self.model = self.sync.module
        self.loss = window_loss(loss)
        self.steps = steps
        self.reduction: Reduction = reduction
        self.autocast = autocast
        self.loss_scale = loss_scale
        self.local_loss = local_loss
        self.fp32_buffers = fp32_buffers
        self.after_micro_batch: list[Callable[[MicroBatch], None]] = []
        self.on_discard: list[Callable[[], None]] = []
        self.under_way = 0
        self._weights: Weights | None = None
        self._buffers = Fp32Buffers(model.parameters()) if fp32_buffers else None

    def backward(
        self,
        inputs: Nested,
        targets: Nested,
        *,
        steps: int | None = None,
        samples: int | None = None,
        weight: float | None = None,
        observe: Observer | None = None,
        agree: Callable[[], None] | None = None,
    ) -> WindowResult:
        """Forward and backward of every micro-batch; gradients are added to `.grad`.

        Nothing here waits for the device.

        Args:
            inputs: the update's whole batch on this rank, samples first.
            targets: its targets, samples first.
            steps: micro-batches for this window alone, for example for the last one of an epoch; the
                same on all ranks.
            samples: how many of the batch's samples count, the first ones. What follows is padding: on
                several ranks a rank without a sample of its own gives one and `samples=0`.
            weight: what the window's samples weigh on all ranks together, if it is known, and on all of them:
                it is then not counted. A sum of micro-batch means counts each one's.
            observe: called with each micro-batch's detached outputs and its targets.
            agree: for `Recovery`. No rank then waits for another in a micro-batch; this is called when all
                are done, to ask the others, and what it raises ends the window before gradients are added.

        Raises:
            ValueError: if the batch has fewer samples than `steps` (on several ranks: none at all), its
                tensors disagree in size, or `samples` are not in it.
        """
        steps = self.steps if steps is None else steps
        held = batch_size((inputs, targets))
        samples = held if samples is None else samples
        if not 0 <= samples <= held or not held:
            raise ValueError(f"samples={samples}: the batch has {held}, and one is needed to pad with")
        sizes = split_sizes(samples, steps, empty=self.sync.ranks.size > 1)
        padding = [map_tensors(_first, batch) for batch in (inputs, targets)] if 0 in sizes else []
        if samples < held:
            inputs, targets = (map_tensors(lambda t: t[:samples], batch) for batch in (inputs, targets))
        parts = list(zip(split(inputs, sizes), split(targets, sizes), strict=True))
        self.under_way = 0
        weights = self._weights = Weights(self, targets, [targets_k for _, targets_k in parts], weight)
        share: Tensor | None = None  # of an item in the loss: 1 / weight
        total: Tensor | None = None
        done: MicroBatch | None = None
        if self._buffers:
            self._buffers.open()
        for k, (inputs_k, targets_k) in enumerate(parts):
            self.under_way = k
            if not sizes[k]:
                inputs_k, targets_k = padding
            last = k == steps - 1
            with self.sync.micro_batch(last and not self._buffers and agree is None):
                with self._precision():
                    outputs = call(self.sync.forward, inputs_k)
                    loss_sum = self.loss.total(outputs, targets_k)
                if share is None or self.reduction == "sum":
                    share = share_of(weights.of(k), loss_sum)
                # The gradient of loss_sum / weight, without a division to record and to go back through.
                loss_sum.backward(self._seed(share) if sizes[k] else torch.zeros_like(share))
            if self.after_micro_batch:
                done = MicroBatch(k, last, sizes[k], targets_k, share)
                if agree is None or not last:
                    self._tell(done)
            if sizes[k]:
                detached = loss_sum.detach()
                total = detached if total is None else total + detached
                if observe is not None:
                    observe(outputs.detach() if isinstance(outputs, Tensor) else outputs, targets_k)
            # Outputs must not live through the next forward: for a language model they are the peak.
            del outputs, loss_sum
        assert share is not None
        if agree is not None:
            agree()
            if not self._buffers:
                self.sync.reduce_gradients()
            if done is not None:
                self._tell(done)
        if self._buffers:
            self._buffers.close(self.sync.ranks)
        total = torch.zeros_like(share) if total is None else total
        mean = total * (share if self.reduction == "mean" else share_of(weights.total, total))
        if not self.local_loss:
            self.sync.ranks.sum(mean)
        return WindowResult(mean, weights.total, samples, steps)

    def discard(self) -> None:
        """Gives up a window that has failed on this rank or another. Gradients are left as they are."""
        if self._weights is not None:
            self._weights.arrive()
        if self._buffers:
            self._buffers.drop()
        for discard in self.on_discard:
            discard()

    def _tell(self, micro_batch: MicroBatch) -> None:
        for after in self.after_micro_batch:
            after(micro_batch)

    def _seed(self, share: Tensor) -> Tensor:
        """What autograd starts from: the share, times what the optimizer's step and the ranks undo."""
        if self.loss_scale is not None:
            share = (share * self.loss_scale.scale).to(share.dtype)
        return share if self.sync.factor == 1 else share * self.sync.factor

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return NOTHING
        return torch.autocast(next(self.model.parameters()).device.type, self.autocast)


def call(model: nn.Module, inputs: Nested) -> Any:
    """`model` on a tensor, on the items of a tuple or list, or on the named values of a dict."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _first(tensor: Tensor) -> Tensor:
    return tensor[:1]
