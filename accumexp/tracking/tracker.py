"""The MLflow run of one training run.

Points are sent in batches: a single `log_metric` takes milliseconds, a point of a batch a tenth of one. A
thread sends them. If the store does not answer, training goes on, and what is logged waits in `unsent.jsonl`.
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
from ..environment.console import print_line
from ..errors import UsageError
from .addresses import URI
from .delivery import Delivery
from .earlier import Earlier, earlier_of
from .names import LegalNames, legal_name
from .outbox import Outbox, described
from .run_folder import CHECKPOINTS, RunFolder, RunStatus
from .sender import Sender
from .store import Store

if TYPE_CHECKING:
    from ..data.digest import DatasetRecord

log = logging.getLogger(__name__)
MAX_PARAM_LENGTH = 6000


class Tracker:
    """The interface of trackers. It keeps nothing itself (`tracking=none`)."""

    run_id: str | None = None
    run_name: str = ""
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

    def model_address(self, update: int) -> str | None:
        """The address of the logged model of an update, None before the store has it."""

    def log(self, update: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def final(self, values: Mapping[str, float]) -> None:
        """Logs values of the whole run, without a step."""

    def tag(self, tags: Mapping[str, str]) -> None: ...

    def artifact(self, path: Path, folder: str | None = None) -> None: ...

    def checkpoint(
        self,
        path: Path,
        update: int,
        evaluated: Mapping[str, float],
        weights: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Uploads a checkpoint, and makes an evaluated one a logged model.

        Args:
            weights: the checkpoint with the whole model, where that of `path` is in shards.
            tags: of the logged model.
        """

    def keep_models(self, updates: Collection[int]) -> None:
        """Removes the logged models of other updates, which an earlier stop has left."""

    def end(self, status: RunStatus) -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""


class MLflowTracker(Tracker):
    """An open MLflow run. A thread sends what is logged; no method waits for the store but `end`.

    Args:
        folder: that of the run, which keeps what is not sent yet; None for a temporary file.
        resumed: goes on with a run that the store has.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        config: TrackingConfig,
        resumed: bool = False,
        folder: RunFolder | None = None,
    ) -> None:
        self.store = store
        self.run_id = run_id
        self.run_name = store.client.get_run(run_id).info.run_name or run_id
        self.address = store.run_address(run_id)
        self.ui_command = store.ui_command
        self.from_environment = store.from_environment
        self._folder = folder
        self._legal = LegalNames()
        self._infinite: set[str] = set()
        self._ended = False
        earlier = earlier_of(store, run_id, folder) if resumed else Earlier()
        self._times = earlier.times
        self._logged = frozenset(point for point in self._times if not point[0].startswith("final/"))
        self._final_updates = earlier.final_updates
        self._earlier_models = earlier.models
        if resumed:
            store.client.update_run(run_id, status=RunStatus.RUNNING)
        outbox = Outbox(folder.unsent if folder else None, self.identity(), earlier.unsent)
        delivery = Delivery(store, run_id, folder.path if folder else None, earlier.models)
        self._delivery = delivery
        self._sender = Sender(outbox, delivery, config.flush_points, config.flush_seconds)
        self._monitor: Any = None
        if config.system_metrics:
            from .system_metrics import SystemMetrics

            self._monitor = SystemMetrics(run_id, store.uri, earlier.system_step, self._log_system)
            self._monitor.start()

    def identity(self) -> dict[str, str]:
        return {"uri": self.store.uri, "experiment_id": self.store.experiment_id, "run_id": str(self.run_id)}

    def model_address(self, update: int) -> str | None:
        model_id = self._delivery.models.get(model_name(update))
        return f"models:/{model_id}" if model_id else None

    def params(self, params: Mapping[str, Any]) -> None:
        """Logs the params. Waits for the store, as `dataset` does."""
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
        if tags:
            self._sender.add({"tags": {legal_name(key): str(value) for key, value in tags.items()}})

    def log(self, update: int, values: Mapping[str, float]) -> None:
        now = milliseconds()
        points = []
        for key, value in ((self._legal(key), value) for key, value in values.items()):
            # A resumed run repeats the points after its checkpoint, with equal values.
            if math.isinf(value):  # MLflow would store the largest float
                if key not in self._infinite:
                    self._infinite.add(key)
                    log.warning(
                        "tracking: %s is %s at update %d, which MLflow does not hold", key, value, update
                    )
            elif (key, update) not in self._logged:
                points.append((key, value, now, update))
                if key.startswith(("eval/", "test/")):
                    self._times[key, update] = now
        if points:
            self._sender.add({"points": points})

    def _log_system(self, step: int, values: Mapping[str, float]) -> None:
        now = milliseconds()
        self._sender.add({"points": [(key, float(value), now, step) for key, value in values.items()]})

    def flush(self) -> None:
        self._sender.flush()

    def final(self, values: Mapping[str, float]) -> None:
        if self._final_updates is not None and values.get("updates") == self._final_updates:
            return
        self.log(0, {f"final/{key}": value for key, value in values.items()})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._sender.add({"file": self._name(path), "folder": folder})

    def _name(self, path: Path) -> str:
        """`path` in the run's folder, which may have another place when the file is sent."""
        base = self._folder.path if self._folder else Path()
        return str(path.relative_to(base) if path.is_relative_to(base) else path.absolute())

    def checkpoint(
        self,
        path: Path,
        update: int,
        evaluated: Mapping[str, float],
        weights: Path | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.artifact(path, CHECKPOINTS)
        if not evaluated:
            return
        now = milliseconds()
        # With the time of the run's own points, MLflow does not store them twice.
        values = [
            (key, value, self._times.get((key, update), now), update)
            for key, value in ((self._legal(key), value) for key, value in evaluated.items())
        ]
        model = {"model": model_name(update), "step": update, "values": values}
        model |= {"checkpoint": f"{CHECKPOINTS}/{path.name}", "model tags": dict(tags or {})}
        if self._folder and self._folder.model_inputs.exists():
            model["inputs"] = self._name(self._folder.model_inputs)
        self._sender.add({**model, "weights": self._name(weights or path)})

    def keep_models(self, updates: Collection[int]) -> None:
        kept = {model_name(update) for update in updates}
        if stale := [name for name in self._earlier_models if name not in kept]:
            self._sender.add({"stale models": stale})

    def end(self, status: RunStatus) -> None:
        if self._monitor:
            self._monitor.finish()
        if self._ended:
            return
        self._sender.add({"status": status, "time": milliseconds()})
        if unsent := self._sender.close():
            log.warning(
                "tracking: %s of the run did not reach %s (%s)",
                *(described(unsent), self.store.uri, self._sender.reason),
            )
            if self._folder:
                print_line(
                    f"send it with\n  python -m accumexp.report sync={self._folder.path}", markup=False
                )
        elif self._folder:
            self._folder.model_inputs.unlink(missing_ok=True)  # the logged models have it
        self._ended = True


def model_name(update: int) -> str:
    """The name of the logged model of an update."""
    return f"update-{update}"


def milliseconds() -> int:
    """The time as MLflow counts it, in milliseconds since 1970."""
    return int(time.time() * 1000)


def reopen(
    config: TrackingConfig,
    identity: Mapping[str, str],
    changes: Mapping[str, Any] | None = None,
    folder: RunFolder | None = None,
) -> Tracker:
    """Resumes the MLflow run of a checkpoint.

    Args:
        changes: the settings that the resumed run changes, by dotted key: a store or name given anew counts.
        folder: that of the run, with what is not sent yet.

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
        tracker = MLflowTracker(store, identity["run_id"], config, resumed=True, folder=folder)
        if "tracking.run_name" in changes:
            store.client.update_run(identity["run_id"], name=config.run_name)
        return tracker
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"resume: run {identity['run_id']} is not in {store.uri}: {error}; "
            "give the store that has it with tracking.uri=..., or tracking.backend=none to go on without it"
        ) from error
