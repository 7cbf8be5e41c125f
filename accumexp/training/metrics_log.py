"""The metrics of updates: kept on the device until they are read, and then recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..accum import Window
from ..environment.memory import MIB
from ..errors import TrainingError
from .evaluation import WindowMetrics
from .metrics import Metrics
from .metrics_sink import MetricsSink
from .progress import Progress
from .throughput import ActivationMeter, Throughput, peak_bytes

# The first updates are all published: there the losses of equal windows differ by rounding alone.
FIRST_UPDATES = 100
# Consecutive windows that may overflow where a smaller loss scale does not help, before the run fails: at the
# smallest scale, with a loss that is not finite itself, or at the end of the run.
MOST_OVERFLOWS = 10
# Consecutive windows that may overflow at all: halved once a window, fp32 has no scale left before.
MOST_SKIPPED = 300
# Losses in one tensor.
BLOCK = 128


# Learning rates by the keys they are logged under.
Rates = Mapping[str, float | Tensor]


class _Update(NamedTuple):
    number: int
    overflow: Tensor | None
    rates: Rates
    terms: Mapping[str, Tensor]


class _Numbers(NamedTuple):
    """What a read takes from the device.

    Attributes:
        losses, overflows: of every update.
        terms: metrics of the loss's terms in the last one, if it is published.
        scaling: metrics of the loss scale.
        in_vain, in_a_row: skipped windows, as in `LossScale`.
    """

    losses: list[float]
    overflows: list[float]
    terms: dict[str, float]
    scaling: dict[str, float]
    in_vain: float
    in_a_row: float


def as_numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """`values`, to which callbacks may have added tensors of one element.

    Raises:
        TrainingError: naming what is no number.
    """
    numbers = {}
    for key, value in values.items():
        if not isinstance(key, str):
            raise TrainingError(f"{key!r}: a callback logs numbers by name, not by a {type(key).__name__}")
        try:
            numbers[key] = float(value)
        except OverflowError as error:
            raise TrainingError(f"{key}: a callback logs a number that is larger than any float") from error
        except (TypeError, ValueError) as error:
            raise TrainingError(f"{key}: a callback logs numbers, not a {type(value).__name__}") from error
    return numbers


class MetricsLog:
    """Keeps the results of updates on the device until `read`, which records them in `sink`.

    Args:
        window: whose ranks' parts of a loss are added, and whose loss scale is watched.
        train_metrics: over the windows of published updates.
        check_finite: fail on a loss that is inf or nan, unless its window was skipped.
        split_steps: by update, the micro-batches of a window that was split finer; taken out when recorded.

    Attributes:
        latest: the newest value of every published metric.
    """

    def __init__(
        self,
        window: Window,
        train_metrics: Metrics,
        sink: MetricsSink,
        check_finite: bool,
        split_steps: dict[int, int],
    ) -> None:
        self.window = window
        self.train_metrics = WindowMetrics(train_metrics, window.loss)
        self.sink = sink
        self.check_finite = check_finite
        self.split_steps = split_steps
        self.latest: dict[str, float] = {}
        self.activations = ActivationMeter()
        self.throughput = Throughput()
        self._not_finite = 0  # windows in a row whose loss is not finite, whatever the scale
        self._pending: list[_Update] = []
        # The losses are in a few tensors that stay. A small tensor allocated in every update would fragment
        # the heap: activations would then get other addresses, not in the cache, every time.
        self._losses: list[Tensor] = []
        self._slots: list[Tensor] = []

    def add(
        self,
        update: int,
        loss: Tensor,
        overflow: Tensor | None,
        rates: Rates,
        terms: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds an update: this rank's part of the loss, whether it was skipped, the learning rates.

        `terms` are this rank's parts of the loss's terms, of an update that is published.
        """
        if len(self._pending) == len(self._slots):
            block = torch.zeros(BLOCK, dtype=torch.float64, device=loss.device)
            self._losses.append(block)
            self._slots.extend(block.unbind())
        self._slots[len(self._pending)].copy_(loss)
        self._pending.append(_Update(update, overflow, rates, terms or {}))

    def measured(
        self, progress: Progress, norm: Tensor | None, first: bool, optimizer: Any
    ) -> dict[str, float]:
        """The further values of an update that is published. Waits for the device.

        Args:
            norm: the gradient's 2-norm before clipping, or None.
            first: whether no update was published before.
            optimizer: whose state is part of the memory.
        """
        values: dict[str, float] = {}
        if norm is not None and math.isfinite(length := float(norm)):
            values["train/grad_norm"] = length
        values.update({f"train/{name}": value for name, value in self.train_metrics.values().items()})
        values.update(self.throughput.speeds(progress))
        values["perf/peak_memory_mib"] = peak_bytes(self.window, optimizer, progress) / MIB
        if self.activations.take_new() or first:
            values["perf/activation_mib"] = progress.activation_bytes / MIB
        self.throughput.mark(progress)
        return values

    def read(
        self,
        newest: int,
        last: bool,
        extra: Mapping[str, float] | None,
        publish_first: bool = True,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Reads and records the updates since the last read. Waits for the device.

        Args:
            newest: the last update that was made.
            last: whether it is the run's last.
            extra: further values of the newest update, which is published with them.
            publish_first: whether the first updates are published.
            total: adds the ranks' parts of the losses, by default a collective.

        Raises:
            TrainingError: for a loss that is not finite, or a run of skipped windows alone.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        losses, overflows, terms, scaling, in_vain, in_a_row = self._numbers(
            pending, total or self.window.sync.ranks.sum
        )
        for update, loss, overflow in zip(pending, losses, overflows, strict=True):
            self._not_finite = self._not_finite + 1 if overflow and not math.isfinite(loss) else 0
            if self.check_finite and not overflow and not math.isfinite(loss):
                if in_vain < MOST_OVERFLOWS:
                    raise TrainingError(
                        f"train/loss is {loss} at update {update.number}: lower optimizer.lr, set "
                        "trainer.clip_norm, or go on regardless with trainer.check_finite=false"
                    )
                break
            values = {"train/loss": loss, **{key: float(rate) for key, rate in update.rates.items()}}
            publish = extra is not None and update.number == newest
            if publish:
                values.update({**terms, **as_numbers(extra or {}), **scaling})
                self.latest.update(values)
            if update.number in self.split_steps:
                values["accum/steps"] = self.split_steps.pop(update.number)
                publish = True
            first = publish_first and update.number <= FIRST_UPDATES
            self.sink.record(update.number, values, publish or first)
        skipped = scaling.get("accum/skipped_windows", 0.0)
        useless = max(in_vain, self._not_finite, in_a_row if last else 0)
        if useless >= MOST_OVERFLOWS or in_a_row >= MOST_SKIPPED or last and skipped == newest:
            raise TrainingError(
                f"every window overflows: {skipped:.0f} of {pending[-1].number} were skipped, the last "
                f"{in_a_row:.0f} in a row, the last at loss scale {scaling['accum/loss_scale']:g}; look for "
                "inf or nan in the data and the forward pass, lower accum.init_scale (and accum.min_scale, "
                "the smallest it may become), or use precision=bf16 accum.loss_scale=none"
            )

    def _numbers(self, pending: list[_Update], total: Callable[[Tensor], Tensor]) -> _Numbers:
        scale, count, terms = self.window.loss_scale, len(pending), pending[-1].terms
        # Sorted, because a rank with padding alone may have them in another order.
        names = sorted(terms)
        parts = [terms[name].double().reshape(1) for name in names]
        device_numbers = total(torch.cat([torch.cat(self._losses)[:count], *parts]))
        if scale is not None:
            overflows = torch.stack([update.overflow for update in pending if update.overflow is not None])
            device_numbers = torch.cat([device_numbers, overflows.double(), scale.counters()])
        numbers = device_numbers.tolist()
        losses, numbers = numbers[:count], numbers[count:]
        of_terms = {f"train/loss/{name}": numbers[k] for k, name in enumerate(names)}
        if scale is None:
            return _Numbers(losses, [0.0] * count, of_terms, {}, 0.0, 0.0)
        size, skipped, in_vain, in_a_row = numbers[-4:]
        scaling = {"accum/loss_scale": size, "accum/skipped_windows": skipped}
        return _Numbers(losses, numbers[len(names) : -4], of_terms, scaling, in_vain, in_a_row)
