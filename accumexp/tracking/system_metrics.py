"""Load of the processor, memory, disk, network and GPUs, as MLflow measures them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

log = logging.getLogger(__name__)
# Seconds between two samples.
INTERVAL = 5


class SystemMetrics(SystemMetricsMonitor):
    """Measures in a thread, and gives what it measures to `log` instead of sending it itself.

    MLflow's own thread asks the store for the run before each sample, and waits for a store that does not
    answer.

    Args:
        first_step: the step of the first sample.
        log: takes a step and values by their keys, `system/*`.
    """

    def __init__(
        self, run_id: str, uri: str, first_step: int, log: Callable[[int, Mapping[str, float]], None]
    ) -> None:
        super().__init__(run_id, sampling_interval=INTERVAL, tracking_uri=uri)
        self._step = first_step
        self._log = log

    def monitor(self) -> None:
        try:
            self._measure()
        except Exception:  # training goes on without
            log.debug("the load of the machine is not measured any more", exc_info=True)

    def _measure(self) -> None:
        self.collect_metrics()
        while not self._shutdown_event.wait(self.sampling_interval):
            values = self.aggregate_metrics()
            prefix = f"system/{self.node_id}/" if self.node_id else "system/"
            self._log(self._step, {f"{prefix}{name}": value for name, value in values.items()})
            self._step += 1
            for monitor in self.monitors:
                monitor.clear_metrics()
            self.collect_metrics()

    def finish(self) -> None:
        self._shutdown_event.set()
        if self._process is not None:
            self._process.join()
            self._process = None
