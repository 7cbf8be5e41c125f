"""Entries of an outbox, brought into the MLflow run that they are of."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .json_file import read_json
from .links import link, local_folder
from .logged_model import DATA, WEIGHTS, write_description, write_model_alone
from .outbox import Entry
from .run_folder import CHECKPOINTS
from .store import REQUEST_TIMEOUT, Store

log = logging.getLogger(__name__)
MAX_POINTS_A_CALL = 1000
# Error codes of what a store will not take later either.
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
# The slowest upload that is waited for, in bytes a second.
SLOWEST_UPLOAD = 2**20


class Delivery:
    """Sends entries to a run. One that is sent again changes nothing.

    Points have the time at which they were logged, and of equal ones MLflow keeps one.

    Args:
        folder: that of the run, to which the paths of files are relative.
        models: the run's logged models that are complete, name to id.

    Attributes:
        models: these and those that were sent.
        failed: files and models that could not be sent while what came after them could, as when the
            artifacts lie elsewhere than the points.
        error: why the newest of them failed.
        uploading: the bytes of the file that is being sent.
    """

    def __init__(
        self, store: Store, run_id: str, folder: Path | None, models: Mapping[str, str] | None = None
    ) -> None:
        self.store = store
        self.run_id = run_id
        self.folder = folder or Path()
        self.failed: list[Entry] = []
        self.error: Exception | None = None
        self.uploading = 0
        self.models = dict(models or {})

    def send(self, entries: Sequence[Entry], sent: Callable[[int], None]) -> None:
        """Sends `entries` in order, the points of several in one call.

        Args:
            sent: gets the number of entries that are done, after each call.

        Raises:
            Exception: of the store, which may take the rest later.
        """
        done = 0
        while done < len(entries):
            self.store.check_there()
            end, points = done, []
            while end < len(entries) and "points" in entries[end] and len(points) < MAX_POINTS_A_CALL:
                points += entries[end]["points"]
                end += 1
            if points:
                self._send_points(points)
            else:
                self._send_other(entries[done])
                end = done + 1
            sent(end)
            done = end

    def send_failed(self, progress: Callable[[], None]) -> None:
        """Tries files and models once more; `failed` has those that fail again.

        Args:
            progress: called after each that is sent.
        """
        for entry in list(self.failed):
            try:
                self._send_one(entry)
            except Exception as error:
                self.error = error
            else:
                self.failed.remove(entry)
                progress()

    def _send_points(self, points: Sequence[Sequence[Any]]) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(points), MAX_POINTS_A_CALL):
            self._log([Metric(*point) for point in points[start : start + MAX_POINTS_A_CALL]])

    def _log(self, points: Sequence[Any]) -> None:
        """Sends points; those of keys that the store refuses for good are left out, with a warning."""
        try:
            self.store.client.log_batch(self.run_id, points)
        except Exception as error:
            if getattr(error, "error_code", "") not in REFUSED:
                raise
            if len(keys := {point.key for point in points}) > 1:
                for key in keys:
                    self._log([point for point in points if point.key == key])
            else:
                (key,) = keys
                log.warning(
                    "tracking: %s refuses %d points of %s, which are in metrics.jsonl: %s",
                    *(self.store.uri, len(points), key, error),
                )

    def _send_other(self, entry: Entry) -> None:
        try:
            self._send_one(entry)
        except Exception as error:
            if "file" not in entry and "model" not in entry:
                raise
            self.failed.append(entry)
            self.error = error

    def _send_one(self, entry: Entry) -> None:
        if "status" in entry:
            self.store.client.set_terminated(self.run_id, entry["status"], entry["time"])
        elif "tags" in entry:
            self._send_tags(entry["tags"])
        elif "file" in entry:
            self._send_file(entry)
        elif "stale models" in entry:
            self._delete_models(entry["stale models"])
        else:
            self._send_model(entry)

    def _send_tags(self, tags: dict[str, str]) -> None:
        for key, value in tags.items():
            try:
                self.store.client.set_tag(self.run_id, key, value)
            except Exception as error:
                if getattr(error, "error_code", "") not in REFUSED:
                    raise
                log.warning("tracking: %s refuses the tag %s: %s", self.store.uri, key, error)

    def _send_file(self, entry: Entry) -> None:
        path = self.folder / entry["file"]
        if not path.exists():
            log.warning("tracking: %s is not there any more, and is not sent", path)
            return
        files = [path, *path.rglob("*")] if path.is_dir() else [path]
        with self._upload(sum(file.stat().st_size for file in files)):
            if entry["folder"] == CHECKPOINTS and path.is_file() and self._linked(path, CHECKPOINTS):
                return
            self.store.client.log_artifact(self.run_id, str(path), entry["folder"])

    def _linked(self, checkpoint: Path, folder: str) -> bool:
        """Whether the checkpoint is now an artifact of the run as a link, which needs no room on the disk."""
        root = self._artifacts
        return root is not None and link(checkpoint, root / folder / checkpoint.name)

    @cached_property
    def _artifacts(self) -> Path | None:
        """The folder of the run's artifacts, None if it is not on this machine."""
        return local_folder(self.store.client.get_run(self.run_id).info.artifact_uri)

    @contextmanager
    def _upload(self, size: int) -> Iterator[None]:
        """Gives MLflow's requests the time that an upload of `size` bytes takes."""
        self.uploading = size
        name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
        usual = os.environ.get(name)
        if usual == str(REQUEST_TIMEOUT):  # not the user's
            os.environ[name] = str(REQUEST_TIMEOUT + size // SLOWEST_UPLOAD)
        try:
            yield
        finally:
            self.uploading = 0
            if usual is not None:
                os.environ[name] = usual

    def _send_model(self, entry: Entry) -> None:
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

        client, name = self.store.client, entry["model"]
        if name in self.models:
            return
        # One that an earlier try began is completed.
        begun = next((model for model in self._logged_models() if model.name == name), None)
        model = begun or client.create_logged_model(
            self.store.experiment_id,
            name=name,
            source_run_id=self.run_id,
            tags={"accumexp.checkpoint": entry["checkpoint"], **entry.get("model tags", {})},
            model_type="checkpoint",
        )
        model_id = model.model_id
        self._send_model_files(entry, model)
        client.log_batch(self.run_id, [Metric(*point, model_id=model_id) for point in entry["values"]])
        if begun is None or not self._is_output(model_id):
            client.log_outputs(self.run_id, [LoggedModelOutput(model_id, entry["step"])])
        client.finalize_logged_model(model_id, LoggedModelStatus.READY)
        self.models[name] = model_id

    def _is_output(self, model_id: str) -> bool:
        outputs = self.store.client.get_run(self.run_id).outputs.model_outputs
        return model_id in [output.model_id for output in outputs]

    def _send_model_files(self, entry: Entry, model: Any) -> None:
        """Sends what `mlflow.pytorch` and `mlflow.pyfunc` open; a local store links to the checkpoint."""
        checkpoint = self.folder / entry.get("weights", "")
        if not checkpoint.is_file():  # an entry of an earlier version, or the checkpoint is gone
            log.warning("tracking: %s is not there any more, %s has no files", checkpoint, entry["model"])
            return
        root = local_folder(model.artifact_location)
        described = read_json(self.folder / entry["inputs"]) if entry.get("inputs") else {}
        with TemporaryDirectory(prefix="accumexp-model-") as name, self._upload(checkpoint.stat().st_size):
            folder = Path(name)
            write_description(folder, model.model_id, self.run_id, described)
            if root is None or not link(checkpoint, root / DATA / WEIGHTS):
                write_model_alone(checkpoint, folder / DATA / WEIGHTS)
            self.store.client.log_model_artifacts(model.model_id, name)

    def _delete_models(self, names: Sequence[str]) -> None:
        """Deletes logged models, but for those that the user has registered."""
        client = self.store.client
        registered = {version.model_id for version in client.search_model_versions(f"run_id='{self.run_id}'")}
        for model in self._logged_models():
            if model.name in names and model.model_id not in registered:
                client.delete_logged_model(model.model_id)

    def _logged_models(self) -> list[Any]:
        return logged_models(self.store, self.run_id)


def logged_models(store: Store, run_id: str) -> list[Any]:
    query = f"source_run_id = '{run_id}'"
    return list(store.client.search_logged_models([store.experiment_id], filter_string=query))


def ready_models(store: Store, run_id: str) -> dict[str, str]:
    """A run's logged models that are complete, name to id."""
    from mlflow.entities import LoggedModelStatus

    models = logged_models(store, run_id)
    return {model.name: model.model_id for model in models if model.status == LoggedModelStatus.READY}
