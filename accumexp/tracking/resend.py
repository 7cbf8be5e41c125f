"""Sends what runs left unsent because their store did not answer."""

from __future__ import annotations

from pathlib import Path

from ..config.schema import TrackingConfig
from ..environment.console import steps
from ..errors import TrainingError, UsageError
from .addresses import check_credentials
from .delivery import MAX_POINTS_A_CALL, Delivery, ready_models
from .outbox import described, read_unsent
from .run_folder import UNSENT, RunFolder
from .sender import reason_of
from .store import Store


def unsent_runs(folder: Path) -> list[RunFolder]:
    """The folders, `folder` or below it, of the runs that have something to send.

    Raises:
        UsageError: if there is no such folder.
    """
    if not folder.is_dir():
        raise UsageError(f"sync={folder}: no such folder; that of a run or of a sweep is needed")
    return sorted((RunFolder(path.parent) for path in folder.rglob(UNSENT)), key=lambda run: run.path)


def send_unsent(run: RunFolder, uri: str = "") -> str:
    """Sends what a run left, and removes its file. What the store has already stays as it is.

    Args:
        uri: the store, if it is not the one that the run was in.

    Returns:
        What was sent, and the page of the run.

    Raises:
        UsageError: if a process works on the run, or its store does not answer.
        TrainingError: if the store does not take all.
    """
    RunFolder(run.path.parent).check_free("sync")  # of a replica the job's folder has the lock
    with run.hold_alone("sync"):
        return _send(run, uri)


def _send(run: RunFolder, uri: str) -> str:
    identity, entries = read_unsent(run.unsent)
    if not entries:
        run.unsent.unlink()
        return "nothing was left to send"
    if not uri:
        check_credentials(identity["uri"], str(run.unsent))
    store = Store(TrackingConfig(uri=uri or identity["uri"]), identity["experiment_id"])
    run_id = identity["run_id"]
    store.close_dead_runs()
    try:
        delivery = Delivery(store, run_id, run.path, ready_models(store, run_id))
        parts = range(0, len(entries), MAX_POINTS_A_CALL)
        for start in steps("sending", parts):
            delivery.send(entries[start : start + MAX_POINTS_A_CALL], lambda count: None)
    except Exception as error:
        raise TrainingError(
            f"sync={run.path}: {store.uri} does not take run {run_id} ({reason_of(error)}); try again, "
            "or give the store that has it with tracking.uri=..."
        ) from error
    if delivery.failed:
        raise TrainingError(
            f"sync={run.path}: {described(delivery.failed)} of run {run_id} cannot be sent "
            f"({reason_of(delivery.error)}); the rest is in {store.uri}"
        )
    run.unsent.unlink()
    run.model_inputs.unlink(missing_ok=True)
    return f"{described(entries)}: {store.run_address(run_id)}"
