"""Loss and metrics of a model over a split, every sample counted once."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..accum import Ranks, WindowLoss, call, tensors
from ..accum.loss import WeightedSamples
from ..accum.ranks import ALONE
from ..data import Batches
from ..errors import TrainingError
from .loss_sums import LossSums
from .metrics import Metrics


class Evaluator:
    """Evaluates in eval mode and without gradients; restores the model's mode afterwards.

    Args:
        loss: that of the training; the reported loss is its mean over all items of the split. One that
            couples samples is that of each evaluation batch, averaged.
        metrics: on the device of the data.
        autocast: dtype of `torch.autocast` around the forward pass, or None.
        ranks: the processes among which the split is divided; all of them must call.
    """

    def __init__(
        self,
        loss: WindowLoss,
        metrics: Metrics,
        autocast: torch.dtype | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.loss = loss
        self.metrics = metrics
        self.autocast = autocast
        self.ranks = ranks

    @torch.no_grad()
    def __call__(self, model: nn.Module, batches: Batches) -> dict[str, float]:
        """The loss, each of its terms (`loss/<term>`) and every metric by name, over all ranks.

        Waits for the device once, at the end.

        All are nan if no item of the split counts in the loss.
        """
        was_training = model.training
        model.eval()
        self.metrics.reset()
        sums = LossSums(self.loss, self.ranks)
        device = torch.device("cpu")
        try:
            for batch in batches.epoch(0):
                device = tensors(batch.targets)[0].device
                with precision(self.autocast, device):
                    outputs = call(model, batch.inputs)
                    sums.add(outputs, batch.targets, batch.samples)
                if batch.samples:  # otherwise padding, for forward passes that need every rank
                    self.metrics.update(outputs, unweighted(self.loss, batch.targets))
                del batch, outputs  # frees them before the next forward
            losses = sums.values(device)
            values = {**(losses or {"loss": math.nan}), **plain_values(self.metrics)}
            if losses is None:  # a loss of 0 would be the best there is
                values = dict.fromkeys(values, math.nan)
        finally:
            self.metrics.reset()
            model.train(was_training)
        return values


class WindowMetrics:
    """Metrics over the micro-batches of one window.

    Collects outputs up to `LARGEST` numbers before it updates the metrics: one update costs as much for a
    micro-batch as for a window.
    """

    LARGEST = 2**16

    def __init__(self, metrics: Metrics, loss: WindowLoss | None = None) -> None:
        self.metrics = metrics
        self.loss = loss
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._size = 0

    def observe(self, outputs: Any, targets: Any) -> None:
        """Adds a micro-batch's detached outputs and its targets."""
        targets = unweighted(self.loss, targets)
        if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
            self.metrics.update(outputs, targets)
            return
        self._pending.append((outputs, targets))
        self._size += outputs.numel()
        if self._size > self.LARGEST:
            self._update()

    def discard(self) -> None:
        """Drops all observations."""
        self._pending.clear()
        self._size = 0
        self.metrics.reset()

    def values(self) -> dict[str, float]:
        """The metrics of all observations, which are then dropped. Waits for the device."""
        self._update()
        values = plain_values(self.metrics)
        self.metrics.reset()
        return values

    def _update(self) -> None:
        if self._pending:
            outputs, targets = zip(*self._pending, strict=True)
            self.metrics.update(torch.cat(outputs), torch.cat(targets))
        self._pending.clear()
        self._size = 0


def plain_values(metrics: Metrics) -> dict[str, float]:
    """The computed value of every metric, over all ranks; those of a vector as `<name>/<index>`.

    Raises:
        TrainingError: naming a metric that is no number and no vector.
    """
    values: dict[str, float] = {}
    for name, value in metrics.compute().items():
        values.update(_numbers(name, value))
    return values


def _numbers(name: str, value: Any) -> dict[str, float]:
    try:
        computed = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TrainingError(
            f"metrics.{name}: is a {type(value).__name__}, one number or a vector is needed"
        ) from None
    if computed.numel() == 1:
        return {name: float(computed)}
    if computed.dim() != 1:
        shape = tuple(computed.shape)
        raise TrainingError(f"metrics.{name}: has the shape {shape}, one number or a vector is needed")
    return {f"{name}/{index}": number for index, number in enumerate(computed.tolist())}


def unweighted(loss: WindowLoss | None, targets: Any) -> Any:
    """The targets without the samples' weights, which metrics do not take."""
    return targets[0] if isinstance(loss, WeightedSamples) else targets


def precision(autocast: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if autocast is None else torch.autocast(device.type, autocast)
