"""Finds the sweep of a report, by its folder, its run id or its start time."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..config.schema import TrackingConfig
from ..errors import UsageError
from ..sweeps.sweep import PARENT, sweep_runs
from ..tracking import Store, newest_sweep, sweep_of
from ..tracking.folder import RunFolder
from .jobs import Sweep, from_folder, from_store

REMEDY = "give sweep=<folder or parent run id>, or tracking.uri=<the store's address>"


def find_sweep(sweep: str, uri: str = "") -> Sweep:
    """Reads a sweep.

    Args:
        sweep: its folder, or the id of its parent run or of a job; empty for the newest in the store.
        uri: of the store; empty for that of the sweep's folder, else `mlflow.db` in the current folder.

    Raises:
        UsageError: if there is no such sweep.
    """
    folder = Path(sweep)
    if sweep and folder.is_dir():
        return _from_folder(folder.resolve(), uri)
    if sweep and "/" in sweep:
        raise UsageError(f"sweep={sweep}: no such folder")
    store = _open_store(uri)
    parent = sweep_of(store, sweep) if sweep else newest_sweep(store)
    if parent is None:
        raise UsageError(f"sweep: {store.uri} has none yet; {REMEDY}")
    store.experiment_id = parent.experiment_id
    return from_store(store, parent)


def _from_folder(folder: Path, uri: str) -> Sweep:
    if (folder / PARENT).exists():
        recorded = json.loads((folder / PARENT).read_text())
        store = _open_store(uri or recorded["uri"])
        parent = sweep_of(store, recorded["run_id"])
        store.experiment_id = parent.experiment_id
        return from_store(store, parent, folder)
    if sweep_runs(folder):
        return from_folder(folder)
    if RunFolder(folder).config.exists():
        raise UsageError(f"sweep={folder}: is a single run's folder; a sweep's is needed")
    raise UsageError(f"sweep={folder}: no sweep has been run in this folder; {REMEDY}")


def _open_store(uri: str) -> Store:
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("sqlite:///") or not uri:
        database = Path(uri.removeprefix("sqlite:///") or "mlflow.db")
        if not database.exists():  # opening the store would create it
            raise UsageError(f"sweep: there is no {database.name} in {database.parent.absolute()}; {REMEDY}")
    # An experiment id, so that the store does not create an experiment. The sweep's own replaces it.
    return Store(TrackingConfig(uri=uri or None), "0")
