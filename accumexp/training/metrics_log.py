"""What is recorded of updates: every loss and learning rate, and further values of published updates."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor
from torchmetrics import MetricCollection

from ..accum import StepResult, Window, WindowResult
from ..environment.memory import MIB, peak_memory_mib
from .deferred_metrics import DeferredMetrics, Rates, hopeless
from .evaluation import WindowMetrics
from .metrics_sink import MetricsSink
from .progress import Progress
from .throughput import ActivationMeter, Throughput

# The first updates are all published: there the losses of equal windows differ by rounding alone.
FIRST_UPDATES = 100


class MetricsLog:
    """Records a run's metrics in `sink`.

    Args:
        train_metrics: torchmetrics over the windows of published updates.
        check_finite: fail on a loss that is inf or nan.
        split_steps: by update, the micro-batches of a window that was split finer; taken out when recorded.

    Attributes:
        latest: the newest value of every published metric.
    """

    def __init__(
        self,
        window: Window,
        train_metrics: MetricCollection,
        sink: MetricsSink,
        check_finite: bool,
        split_steps: dict[int, int],
    ) -> None:
        self.train_metrics = WindowMetrics(train_metrics)
        self.sink = sink
        self.split_steps = split_steps
        self.latest: dict[str, float] = {}
        self.activations = ActivationMeter()
        self.throughput = Throughput()
        self._device = next(window.model.parameters()).device
        self._deferred = DeferredMetrics(window, check_finite)

    def add(self, update: int, result: WindowResult, step: StepResult, rates: Rates) -> None:
        """Takes an update's results, which stay on the device until `read`."""
        self._deferred.add(update, result.loss, step.overflow, rates)

    def measured(self, progress: Progress, norm: Tensor | None, first: bool) -> dict[str, float]:
        """The further values of an update that is published. Waits for the device.

        Args:
            norm: the gradient's 2-norm before clipping, or None.
            first: whether no update was published before.
        """
        values: dict[str, float] = {}
        if norm is not None and math.isfinite(length := float(norm)):
            values["train/grad_norm"] = length
        values.update({f"train/{name}": value for name, value in self.train_metrics.values().items()})
        values.update(self.throughput.speeds(progress))
        values["perf/peak_memory_mib"] = peak_memory_mib(self._device)
        if self.activations.take_new() or first:
            values["perf/activation_mib"] = progress.activation_bytes / MIB
        self.throughput.mark(progress)
        return values

    def read(self, newest: int, last: bool, extra: Mapping[str, float] | None) -> None:
        """Reads the losses since the last read in one wait for the device, and records them.

        Args:
            newest: the last update that was made.
            last: whether it is the run's last.
            extra: further values of the newest update, which is published with them.

        Raises:
            TrainingError: for a loss that is not finite, or a run of skipped windows alone.
        """
        reading = self._deferred.read()
        for update, values in reading.rows:
            publish = extra is not None and update == newest
            if publish:
                values.update({**(extra or {}), **reading.scaling})
                self.latest.update(values)
            if update in self.split_steps:
                values["accum/steps"] = self.split_steps.pop(update)
                publish = True
            self.sink.record(update, values, publish or update <= FIRST_UPDATES)
        if reading.trouble:
            raise reading.trouble
        if last and reading.scaling.get("accum/skipped_windows") == newest:
            raise hopeless(reading.scaling["accum/loss_scale"], newest, newest)
