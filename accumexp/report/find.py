"""Finding the sweep that a report is to be made of."""

from __future__ import annotations

import json
from pathlib import Path

from ..config.schema import TrackingConfig
from ..errors import UsageError
from ..sweeps.sweep import PARENT, sweep_runs
from ..tracking import Store, newest_sweep, sweep_of
from ..tracking.folder import RunFolder
from .jobs import Sweep, from_folder, from_store

HOW = "give sweep=<folder or parent run id>, or tracking.uri=<the store's address>"


def find(named: str, uri: str = "") -> Sweep:
    """The sweep in folder `named`, or with that run id, or the newest in the store.

    Args:
        uri: of the store; empty for the one that a sweep's folder names, else `mlflow.db` in this folder.

    Raises:
        UsageError: if there is no such sweep.
    """
    folder = Path(named)
    if named and folder.is_dir():
        return _in_folder(folder.resolve(), uri)
    if named and "/" in named:
        raise UsageError(f"sweep={named}: no such folder")
    store = _store(uri)
    parent = sweep_of(store, named) if named else newest_sweep(store)
    if parent is None:
        raise UsageError(f"sweep: {store.uri} has none yet; {HOW}")
    store.experiment_id = parent.experiment_id
    return from_store(store, parent)


def _in_folder(folder: Path, uri: str) -> Sweep:
    known = folder / PARENT
    if known.exists():
        parent = json.loads(known.read_text())
        store = _store(uri or parent["uri"])
        found = sweep_of(store, parent["run_id"])
        store.experiment_id = found.experiment_id
        return from_store(store, found, folder)
    if sweep_runs(folder):
        return from_folder(folder)
    if RunFolder(folder).config.exists():
        raise UsageError(f"sweep={folder}: is a single run's folder; a sweep's is needed")
    raise UsageError(f"sweep={folder}: no sweep has been run in this folder; {HOW}")


def _store(uri: str) -> Store:
    database = Path(uri.removeprefix("sqlite:///") if uri else "mlflow.db")
    if uri.startswith("sqlite:///") or not uri:
        if not database.exists():  # which a store that is opened to be written to would make
            raise UsageError(f"sweep: there is no {database.name} in {database.parent.absolute()}; {HOW}")
    # Any experiment will do until the sweep is known, and none is to be made.
    return Store(TrackingConfig(uri=uri or None), "0")
