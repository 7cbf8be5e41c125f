"""The window: accumulates the micro-batches of one update into the gradient of the larger batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from .batch import Nested, batch_size, map_tensors, split, split_sizes
from .buffers import Fp32Buffers
from .denominators import Weights, reciprocal_of
from .loss import WindowLoss, window_loss
from .scale import LossScale
from .sync import NOTHING, sync_of

Reduction = Literal["mean", "sum"]
Observer = Callable[[Any, Nested], None]


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch of this rank, right after its backward.

    The backward has added to `.grad` the gradient of the sum of its items' weighted losses, times `share`,
    `Window.loss_scale` and `Window.sync.factor`. After the `last` one, `.grad` holds the sum over the ranks.

    Attributes:
        number: its index in the window, from 0.
        last: whether it is the window's last.
        samples: this rank's samples in it; 0 for padding, whose gradient is 0.
        targets: the samples' targets; their weight is `Window.loss.weight(targets)`.
        share: the factor of the sum, shape (): 1 / the window's weight, or with `reduction="sum"`
            1 / the micro-batch's.
    """

    number: int
    last: bool
    samples: int
    targets: Nested
    share: Tensor


@dataclass(frozen=True)
class WindowResult:
    """The result of one window. Tensors stay on the device; reading them makes the host wait.

    Attributes:
        loss: the mean loss over the window's items on all ranks, shape (), detached; with `local_loss`
            this rank's part, and the parts of all ranks add up to the mean.
        weight: the window's total weight (samples, or the sum of valid items' weights), over all ranks.
        samples: this rank's samples in the window.
        steps: micro-batches in the window.
    """

    loss: Tensor
    weight: Tensor | float
    samples: int
    steps: int


class Window:
    """Adds to `.grad` the gradient of one large batch, one micro-batch at a time.

    With `reduction="mean"` the gradient is that of `sum_i w_i l_i / sum_i w_i` over all items of the window,
    for every split. With `reduction="sum"` it is that of the sum of the micro-batch means, which is about
    `steps` times larger and depends on the split; a micro-batch's mean is over all ranks.

    With a model wrapped for several ranks (`data_parallel`, `fully_sharded`, torch's DistributedDataParallel
    and `fully_shard`) the window holds the samples of all ranks: each rank calls `backward` with its own,
    weights are counted over the ranks, and gradients are reduced in the last micro-batch only.

    Args:
        model: called as `model(x)` with a tensor, `model(*xs)` with a tuple or list, `model(**xs)`
            with a dict.
        loss: a criterion of torch, a function of (outputs, targets), or a `WindowLoss`.
        steps: micro-batches in a window, on each rank.
        reduction: "mean" or "sum", as above.
        autocast: the dtype of `torch.autocast` around forward and loss, or None.
        fp32_buffers: accumulate the gradients of bf16 and fp16 parameters in fp32.
        loss_scale: multiplies the loss before each backward; `OptimizerStep` divides the gradient by it.
        reduce_every_micro_batch: for a fully sharded model, reduce-scatter in every micro-batch: more
            communication, but no unsharded gradient is kept between micro-batches.
        local_loss: do not add the other ranks' loss to the result, which saves a collective.

    Attributes:
        model: the model without its wrapper.
        sync: the synchronisation of the ranks' gradients.
        after_micro_batch: functions called, in order, with a `MicroBatch` right after its backward. They
            may read `.grad`, which is incomplete with fp32 buffers or shards, but must neither change it nor
            wait for the device.
        on_discard: functions called when a window that has begun is discarded and will be repeated.
        under_way: the index of the current micro-batch, or of the last one that ran.

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
        inputs: Nested | Sequence[tuple[Nested, Nested]],
        targets: Nested | None = None,
        *,
        steps: int | None = None,
        samples: int | None = None,
        weight: float | None = None,
        observe: Observer | None = None,
        agree: Callable[[bool], bool] | None = None,
    ) -> WindowResult:
        """Forward and backward of every micro-batch; adds gradients to `.grad`. Does not wait for the device.

        Args:
            inputs: the update's whole batch on this rank, (n, ...). Without `targets`: a list of the
                window's micro-batches, pairs (inputs, targets) of any number of samples each, as a loader
                yields them; as many on all ranks. The denominator is counted over all of them first.
            targets: its targets, (n, ...).
            steps: micro-batches of this window, for example the last one of an epoch; the same on all
                ranks. Default: `Window.steps`.
            samples: the first `samples` of the batch count, the others are padding. On several ranks a rank
                without samples passes one sample as padding and `samples=0`.
            weight: the window's total weight over all ranks; it is then not counted. It must be given on
                all ranks or on none. Ignored with `reduction="sum"`.
            observe: called with each micro-batch's detached outputs and its targets.
            agree: used by `Recovery`: no micro-batch communicates; `agree` is called after the last one, with
                whether this rank did not use some parameter, and returns whether any rank did not. An error
                that it raises ends the window before gradients are reduced.

        Raises:
            ValueError: if the batch has fewer samples than `steps` (on several ranks: no sample), its
                tensors differ in their first dimension, or it has fewer than `samples`; if a list of
                micro-batches is empty, holds anything but pairs, or comes with `steps` or `samples`.
        """
        if targets is None:
            parts = _micro_batches(inputs, steps, samples)
            sizes = [batch_size(part) for part in parts]
            whole, padding = [targets_k for _, targets_k in parts], []
        else:
            parts, sizes, whole, padding = self._split(cast(Nested, inputs), targets, steps, samples)
        steps, samples = len(parts), sum(sizes)
        self.under_way = 0
        by_step = self.reduction == "sum"
        counted = [[targets_k] for _, targets_k in parts] if by_step else [whole]
        weights = self._weights = Weights(self.loss, self.sync, counted, None if by_step else weight)
        share: Tensor | None = None  # 1 / weight, the factor of an item's loss
        total: Tensor | None = None
        done: MicroBatch | None = None
        if self._buffers:
            self._buffers.open()
        if self._buffers or agree is not None:
            self.sync.watch_use()
        for k, (inputs_k, targets_k) in enumerate(parts):
            self.under_way = k
            if not sizes[k]:
                inputs_k, targets_k = padding
            last = k == steps - 1
            with self.sync.micro_batch(last and not self._buffers and agree is None):
                with self._precision():
                    outputs = call(self.sync.forward, inputs_k)
                    loss_sum = self.loss.total(outputs, targets_k)
                if share is None or by_step:
                    share = reciprocal_of(weights.of(k), loss_sum)
                # The gradient of loss_sum / weight, without a division in the graph.
                loss_sum.backward(self._seed(share) if sizes[k] else torch.zeros_like(share))
            if self.after_micro_batch:
                done = MicroBatch(k, last, sizes[k], targets_k, share)
                if agree is None or not last:
                    self._notify(done)
            if sizes[k]:
                detached = loss_sum.detach()
                total = detached if total is None else total + detached
                if observe is not None:
                    observe(outputs.detach() if isinstance(outputs, Tensor) else outputs, targets_k)
            # Freed before the next forward: a language model's outputs are its peak memory.
            del outputs, loss_sum
        assert share is not None
        if agree is not None:
            some_unused = agree(not self._buffers and bool(self.sync.unused()))
            if not self._buffers:
                self.sync.reduce_gradients(some_unused)
            if done is not None:
                self._notify(done)
        if self._buffers:
            self._buffers.close(self.sync)
        total = torch.zeros_like(share) if total is None else total
        mean = total * (reciprocal_of(weights.total, total) if by_step else share)
        if not self.local_loss:
            self.sync.ranks.sum(mean)
        return WindowResult(mean, weights.total, samples, steps)

    def _split(
        self, inputs: Nested, targets: Nested, steps: int | None, samples: int | None
    ) -> tuple[list[tuple[Nested, Nested]], list[int], list[Nested], Any]:
        """The micro-batches of a whole batch, their sizes, all targets, and a sample as padding."""
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
        return parts, sizes, [targets], padding

    def discard(self) -> None:
        """Ends a window that has failed on this rank or another. Gradients are not changed."""
        if self._weights is not None:
            self._weights.wait()
        if self._buffers:
            self._buffers.drop()
        for discard in self.on_discard:
            discard()

    def _notify(self, micro_batch: MicroBatch) -> None:
        for after in self.after_micro_batch:
            after(micro_batch)

    def _seed(self, share: Tensor) -> Tensor:
        """The gradient that backward starts from: the share, times the loss scale and the ranks' factor."""
        if self.loss_scale is not None:
            share = (share * self.loss_scale.scale).to(share.dtype)
        return share if self.sync.factor == 1 else share * self.sync.factor

    def _precision(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return NOTHING
        return torch.autocast(next(self.model.parameters()).device.type, self.autocast)


def call(model: nn.Module, inputs: Nested) -> Any:
    """Calls `model` with a tensor, the items of a tuple or list, or the named values of a dict."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _first(tensor: Tensor) -> Tensor:
    return tensor[:1]


def _micro_batches(given: Any, steps: int | None, samples: int | None) -> list[tuple[Nested, Nested]]:
    """`given` as a list of pairs (inputs, targets), each of at least one sample."""
    if not isinstance(given, list | tuple) or not all(
        isinstance(part, list | tuple) and len(part) == 2 for part in given
    ):
        raise ValueError("backward: without targets, a list of pairs (inputs, targets) is needed")
    if steps not in (None, len(given)) or samples is not None:
        raise ValueError(f"backward: {len(given)} micro-batches are given, leave out steps and samples")
    if not given or not all(batch_size(tuple(part)) for part in given):
        raise ValueError("backward: a window needs at least one micro-batch, and each at least one sample")
    return [(inputs, targets) for inputs, targets in given]
