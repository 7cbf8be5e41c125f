"""The checkpoints of runs and logged models in the store, brought to this machine."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ..config.schema import TrackingConfig
from ..errors import UsageError, first_line
from .logged_model import DATA, WEIGHTS
from .run_folder import BEST, CHECKPOINTS, RunFolder
from .store import DEFAULT_DATABASE, Store, given_uri

RUN = re.compile(r"[0-9a-f]{32}")
MODEL = "models:/"


def is_stored(where: str) -> bool:
    """Whether `where` is the id of a run in MLflow, or the address of a model in it."""
    return where.startswith(MODEL) or RUN.fullmatch(where) is not None


def stored_checkpoints(where: str, uri: str = "", best: bool = True) -> Path:
    """The folder of the run `where`, or of its checkpoints; of a model the checkpoint itself.

    What lies on this machine is not copied.

    Args:
        uri: the store; by default as `accumexp.load` says.
        best: of a run only its best checkpoint is needed, if it has one.

    Raises:
        UsageError: if there is none.
    """
    store = _store(uri)
    try:
        return _of_model(store, where) if where.startswith(MODEL) else _of_run(store, where, best)
    except UsageError:
        raise
    except Exception as error:
        kind = "model" if where.startswith(MODEL) else "run"
        raise UsageError(f"{where}: no such {kind} in {store.uri}: {first_line(error)}") from error


def _store(uri: str) -> Store:
    mlflow = sys.modules.get("mlflow")
    if not uri and mlflow is not None and mlflow.is_tracking_uri_set():
        uri = mlflow.get_tracking_uri()
    uri = uri or given_uri()
    if uri == DEFAULT_DATABASE and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise UsageError(
            f"{uri}: there is no store in this folder; go to that of the command, or set MLFLOW_TRACKING_URI"
        )
    return Store(TrackingConfig(uri=uri))


def _of_run(store: Store, run_id: str, best: bool) -> Path:
    run = store.client.get_run(run_id)
    folder = RunFolder(Path(run.data.tags.get("accumexp.folder", "")))
    summary = folder.summary()
    if summary and summary.run_id == run_id and folder.checkpoints.is_dir():
        return folder.path
    names = [Path(item.path).name for item in store.client.list_artifacts(run_id, CHECKPOINTS)]
    if not names:
        raise UsageError(f"{run_id}: the run has no checkpoint in {store.uri}")
    whole = all(name.endswith(".pt") for name in names)  # no shards beside
    if best and whole and BEST in names:
        return _downloaded(store, f"{run.info.artifact_uri}/{CHECKPOINTS}/{BEST}")
    return _downloaded(store, f"{run.info.artifact_uri}/{CHECKPOINTS}")


def _of_model(store: Store, address: str) -> Path:
    name = address.removeprefix(MODEL)
    model_id = name
    if "/" in name or "@" in name:
        registered, alias = name.split("@") if "@" in name else (name.rpartition("/")[0], "")
        version = (
            store.client.get_model_version_by_alias(registered, alias)
            if alias
            else store.client.get_model_version(registered, name.rpartition("/")[2])
        )
        model_id = version.model_id or str(version.source).removeprefix(MODEL)
    location = store.client.get_logged_model(model_id).artifact_location
    return _downloaded(store, f"{location}/{DATA}/{WEIGHTS}")


def _downloaded(store: Store, uri: str) -> Path:
    from mlflow.artifacts import download_artifacts

    return Path(download_artifacts(artifact_uri=uri, tracking_uri=store.uri))
