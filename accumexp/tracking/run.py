"""The MLflow run of one training run.

Points are sent in batches: a single `log_metric` takes milliseconds, a point of a batch a tenth of one. If
the server stops answering, training goes on and points are queued; `metrics.jsonl` has them all.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.schema import Backend, TrackingConfig
from ..errors import UsageError
from .folder import RunStatus
from .names import LegalNames, legal_name
from .store import URI, Store

if TYPE_CHECKING:
    from ..data.digest import DatasetRecord

log = logging.getLogger(__name__)
MAX_PARAM_LENGTH = 6000
MAX_POINTS_A_CALL = 1000
# Error codes of what a store will not take later either.
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class Tracker:
    """The interface of trackers. It keeps nothing itself (`tracking=none`)."""

    run_id: str | None = None
    address: str | None = None
    ui_command: str | None = None
    from_environment: Sequence[str] = ()

    def identity(self) -> dict[str, str]:
        """What a checkpoint stores to resume the same MLflow run."""
        return {}

    def links(self) -> dict[str, object]:
        """The run's id, its page and the command that serves it, by their shown names."""
        links = {
            "run": self.run_id,
            "UI": self.address,
            "serve it with": self.ui_command,
            "store given by": ", ".join(self.from_environment),
        }
        return {name: value for name, value in links.items() if value}

    def log(self, update: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def final(self, values: Mapping[str, float]) -> None:
        """Logs values of the whole run, without a step."""

    def tag(self, tags: Mapping[str, str]) -> None: ...

    def artifact(self, path: Path, folder: str | None = None) -> None: ...

    def checkpoint(self, path: Path, update: int, evaluated: Mapping[str, float]) -> None:
        """Uploads a checkpoint, and makes an evaluated one a logged model."""

    def keep_models(self, updates: Collection[int]) -> None:
        """Removes the logged models of other updates, which an earlier stop has left."""

    def end(self, status: RunStatus) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""


class MLflowTracker(Tracker):
    """An open MLflow run."""

    def __init__(self, store: Store, run_id: str, config: TrackingConfig, resumed: bool = False) -> None:
        self.store = store
        self.run_id = run_id
        self.address = store.run_address(run_id)
        self.ui_command = store.ui_command
        self.from_environment = store.from_environment
        self._config = config
        self._queue: list[Any] = []
        self._legal = LegalNames()
        self._last_flush = time.monotonic()
        self._failing = False
        self._times: dict[tuple[str, int], int] = {}  # (key, step): milliseconds since 1970
        self._logged = frozenset[tuple[str, int]]()
        self._models: dict[str, str] = {}  # id by name
        self._final_updates: float | None = None  # of `final/*` that an earlier process has logged
        self._infinite: set[str] = set()
        if resumed:
            from mlflow.entities import LoggedModelStatus

            query = f"source_run_id = '{run_id}'"
            models = store.client.search_logged_models([store.experiment_id], filter_string=query)
            for model in models:
                if model.status == LoggedModelStatus.READY:
                    self._models[model.name] = model.model_id
                else:  # of a process that was killed in the upload
                    store.client.delete_logged_model(model.model_id)
            self._final_updates = store.client.get_run(run_id).data.metrics.get("final/updates")
            self._times = self._history()
            self._logged = frozenset(point for point in self._times if not point[0].startswith("final/"))
            store.client.update_run(run_id, status=RunStatus.RUNNING)
        self._monitor: Any = None
        if config.system_metrics:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(
                run_id, sampling_interval=5, resume_logging=resumed, tracking_uri=store.uri
            )
            self._monitor.start()

    def identity(self) -> dict[str, str]:
        return {"uri": self.store.uri, "experiment_id": self.store.experiment_id, "run_id": str(self.run_id)}

    def params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        entries = [Param(self._legal(key), str(value)[:MAX_PARAM_LENGTH]) for key, value in params.items()]
        for start in range(0, len(entries), 100):
            self.store.client.log_batch(self.run_id, params=entries[start : start + 100])

    def dataset(self, record: DatasetRecord) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = json.dumps({"samples": record.samples})
        data = Dataset(record.name, record.digest, source_type="code", source=record.source, profile=profile)
        tags = [InputTag("mlflow.data.context", record.context)]
        self.store.client.log_inputs(self.run_id, [DatasetInput(data, tags)])

    def tag(self, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            try:
                self.store.client.set_tag(self.run_id, legal_name(key), value)
            except Exception as error:
                log.warning("tracking: the tag %s did not reach %s: %s", key, self.store.uri, error)

    def log(self, update: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        for key, value in ((self._legal(key), value) for key, value in values.items()):
            # A resumed run repeats the points after its checkpoint, with equal values.
            if math.isinf(value):  # MLflow would store the largest float
                if key not in self._infinite:
                    self._infinite.add(key)
                    log.warning(
                        "tracking: %s is %s at update %d, which MLflow does not hold", key, value, update
                    )
            elif (key, update) not in self._logged:
                self._queue.append(Metric(key, value, now, update))
                if key.startswith("eval/"):
                    self._times[key, update] = now
        elapsed = time.monotonic() - self._last_flush
        if len(self._queue) >= self._config.flush_points or elapsed >= self._config.flush_seconds:
            self.flush()

    def flush(self) -> None:
        self._last_flush = time.monotonic()
        try:
            while self._queue:
                self._send(self._queue[:MAX_POINTS_A_CALL])
                del self._queue[:MAX_POINTS_A_CALL]
            self._failing = False
        except Exception as error:
            if not self._failing:
                log.warning("tracking: %d points wait for %s: %s", len(self._queue), self.store.uri, error)
            self._failing = True

    def _send(self, points: Sequence[Any]) -> None:
        """Sends points; those of keys that the store refuses for good are left out, with a warning."""
        try:
            self.store.client.log_batch(self.run_id, points)
        except Exception as error:
            if getattr(error, "error_code", "") not in REFUSED:
                raise
            if len(keys := {point.key for point in points}) > 1:
                for key in keys:
                    self._send([point for point in points if point.key == key])
            else:
                (key,) = keys
                log.warning(
                    "tracking: %s refuses %d points of %s, which are in metrics.jsonl: %s",
                    *(self.store.uri, len(points), key, error),
                )

    def final(self, values: Mapping[str, float]) -> None:
        if values and values.get("updates") == self._final_updates:
            return
        self.log(0, {f"final/{key}": value for key, value in values.items()})
        self.flush()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        try:
            self.store.client.log_artifact(self.run_id, str(path), folder)
        except Exception as error:
            log.warning("tracking: %s is not uploaded: %s", path, error)

    def checkpoint(self, path: Path, update: int, evaluated: Mapping[str, float]) -> None:
        self.artifact(path, "checkpoints")
        if not evaluated or f"update-{update}" in self._models:
            return
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

        client, now = self.store.client, int(time.time() * 1000)
        try:
            model = client.create_logged_model(
                self.store.experiment_id,
                name=f"update-{update}",
                source_run_id=self.run_id,
                tags={"accumexp.checkpoint": f"checkpoints/{path.name}"},
                model_type="checkpoint",
            )
            # With the time of the run's own points, MLflow does not store them twice.
            metrics = [
                Metric(key, value, self._times.get((key, update), now), update, model_id=model.model_id)
                for key, value in ((self._legal(key), value) for key, value in evaluated.items())
            ]
            client.log_batch(self.run_id, metrics)
            client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, update)])
            client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
            self._models[f"update-{update}"] = model.model_id
        except Exception as error:
            log.warning("tracking: no logged model for %s: %s", path, error)

    def keep_models(self, updates: Collection[int]) -> None:
        kept = {f"update-{update}" for update in updates}
        try:
            for name in self._models.keys() - kept:
                self.store.client.delete_logged_model(self._models.pop(name))
        except Exception as error:
            log.warning("tracking: a logged model of an earlier stop is not removed: %s", error)

    def end(self, status: RunStatus) -> None:
        if self._monitor:
            self._monitor.finish()
        self.flush()
        if self._queue:
            log.warning("tracking: %d points did not reach %s", len(self._queue), self.store.uri)
        try:
            self.store.client.set_terminated(self.run_id, status)
        except Exception as error:
            log.warning("tracking: %s did not reach %s: %s", status, self.store.uri, error)

    def _history(self) -> dict[tuple[str, int], int]:
        keys = [key for key in self.store.client.get_run(self.run_id).data.metrics if key[:7] != "system/"]
        history = (self.store.client.get_metric_history(self.run_id, key) for key in keys)
        return {(point.key, point.step): point.timestamp for points in history for point in points}


def reopen(
    config: TrackingConfig, identity: Mapping[str, str], changes: Mapping[str, Any] | None = None
) -> Tracker:
    """Resumes the MLflow run of a checkpoint.

    Args:
        changes: the settings that the resumed run changes, by dotted key: a store or name given anew counts.

    Raises:
        UsageError: if its store cannot be reached or does not have the run any more.
    """
    if config.backend is Backend.none or not identity:
        return Tracker()
    changes = changes or {}
    if "tracking.uri" not in changes:
        config.uri = identity["uri"]
        elsewhere = os.environ.get(URI)
        if elsewhere and elsewhere != config.uri:
            log.warning("%s=%s: the run goes on in %s; tracking.uri=... moves it", URI, elsewhere, config.uri)
    store = Store(config, identity["experiment_id"])
    store.close_dead_runs()
    try:
        tracker = MLflowTracker(store, identity["run_id"], config, resumed=True)
        if "tracking.run_name" in changes:
            store.client.update_run(identity["run_id"], name=config.run_name)
        return tracker
    except Exception as error:
        raise UsageError(
            f"resume: run {identity['run_id']} is not in {store.uri}: {error}; "
            "give the store that has it with tracking.uri=..., or tracking.backend=none to go on without it"
        ) from error
