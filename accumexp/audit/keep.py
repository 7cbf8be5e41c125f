"""Keeps the certificates of an audit: a folder with page, pictures and JSON, and a run in MLflow."""

from __future__ import annotations

from pathlib import Path

from ..config.schema import TrackingConfig
from ..proof import Certificate
from ..prove.page import save
from ..prove.session import tags_of
from ..prove.show import markdown
from ..tracking import Store
from ..tracking.record import upload_certificate
from ..tracking.run_folder import RunFolder, RunStatus
from ..tracking.tracker import MLflowTracker
from .cells import Cell


def keep(certificate: Certificate, cell: Cell, folder: Path, mlflow: bool) -> dict[str, object]:
    """Writes a certificate into `folder`, with `mlflow` into a run of the store too. Returns where it is.

    The store is `mlflow.db` in the current folder, or the one that MLFLOW_TRACKING_URI names.
    """
    run_folder = RunFolder(folder)
    save(certificate, run_folder)
    locations: dict[str, object] = {"page": run_folder.certificate_page}
    if not mlflow:
        return locations
    config = TrackingConfig(system_metrics=False)
    store = Store(config)
    tags = {
        "accumexp.command": "audit",
        "accumexp.trainer": f"{cell.trainer} {cell.version}".strip(),
        "mlflow.source.name": "accumexp.audit",
        "mlflow.note.content": markdown(certificate, run_folder.certificate_page.name),
        **tags_of(certificate),
    }
    run_id = store.create_run(f"audit {cell.trainer} {cell.setting}", tags)
    tracker = MLflowTracker(store, run_id, config, folder=run_folder)
    status = RunStatus.FAILED
    try:
        upload_certificate(tracker, run_folder)
        status = RunStatus.FINISHED
    finally:
        tracker.end(status)
    return {**locations, **tracker.links()}
