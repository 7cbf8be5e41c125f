"""The record of a run: its folder, and its MLflow run if it has one."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from ..accum import Inequality
from ..config.loading import flatten
from ..config.schema import Backend, Config
from ..environment.code_version import code_version
from ..environment.device import device_name, tf32
from .metrics_file import Journal, ProgressFile
from .run_folder import RunFolder, RunStatus, Summary
from .store import Store
from .tracker import MLflowTracker, Tracker

if TYPE_CHECKING:
    from ..data.digest import DatasetRecord

# Named with their versions in every run and report.
PACKAGES = ("accumexp", "numpy", "hydra-core", "mlflow")


class RunRecord:
    """The metrics sink of a run: a journal in its folder, and a tracker that gets the published points.

    Without a folder, as on all ranks but the first, it keeps nothing.
    """

    def __init__(self, folder: RunFolder | None = None, upto: int = 0) -> None:
        self.folder = folder
        self.journal = Journal(folder.metrics, upto) if folder else None
        self.tracker = Tracker()
        self.progress: ProgressFile | None = None
        self.tags: dict[str, str] = {}  # of how the run is computed

    def record(self, update: int, values: Mapping[str, float], publish: bool) -> None:
        if self.journal:
            self.journal.write(update, values)
        if publish:
            self.tracker.log(update, values)
            if self.progress:
                self.progress.write(update, values)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Adds tags to the open run."""
        self.tags.update(tags)
        self.tracker.tag(tags)

    def flush(self) -> None:
        if self.journal:
            self.journal.flush()
        self.tracker.flush()

    def summarise(self, summary: Summary) -> None:
        if self.folder:
            self.folder.write_summary(summary)

    def close(self, status: RunStatus) -> None:
        self.flush()
        self.tracker.end(status)  # a signal may interrupt it, and the record is then closed again
        if self.journal:
            self.journal.close()


def upload_certificate(tracker: Tracker, folder: RunFolder) -> None:
    """Uploads the certificate in `folder`, its page and its pictures."""
    for path in (folder.certificate, folder.certificate_page, *folder.certificate_pictures.values()):
        if path.exists():
            tracker.artifact(path)


def describing_tags(device: torch.device, unequal: Sequence[Inequality]) -> dict[str, str]:
    """Tags of the device and libraries of a run, and of why its window cannot be the larger batch."""
    return {
        "accumexp.device": device_name(device),
        "accumexp.python": platform.python_version(),
        "accumexp.torch": torch.__version__,
        "accumexp.packages": ", ".join(f"{name} {version}" for name, version in _versions()),
        "accumexp.tf32": str(tf32(device)).lower(),
        **inequality_tag(unequal),
    }


def _versions() -> Iterator[tuple[str, str]]:
    """The installed packages of `PACKAGES` with their versions."""
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def inequality_tag(unequal: Sequence[Inequality]) -> dict[str, str]:
    """The tag of why a window cannot be the larger batch; empty if it can."""
    reasons = "; ".join(f"{u.module} ({u.kind}): {u.reason}" for u in unequal)
    return {"accumexp.unequal": reasons[:5000]} if unequal else {}


def create_tracker(
    config: Config,
    folder: RunFolder,
    store: Store | None,
    *,
    name: str,
    command: str,
    tags: Mapping[str, str],
    datasets: Sequence[DatasetRecord],
    recorded: Mapping[str, Any] | None = None,
    overrides: Sequence[str] | None = None,
    parent: str | None = None,
) -> Tracker:
    """Creates the MLflow run with its tags, params, data sets and code version. A job has `overrides`.

    Args:
        recorded: the configuration as its params show it, by default as it is.
    """
    if config.tracking.backend is Backend.none or store is None:
        return Tracker()
    store.close_dead_runs(folder.path)
    sha, diff = code_version()
    tags = {
        "accumexp.command": command,
        "accumexp.git_sha": sha,
        **tags,
        "accumexp.folder": str(folder.path),
        "mlflow.source.git.commit": sha,
        **config.tracking.tags,
    }
    if overrides is not None:
        tags["accumexp.overrides"] = json.dumps(overrides)
    if parent:
        tags["mlflow.parentRunId"] = parent
    run_id = store.create_run(config.tracking.run_name or name, tags)
    try:
        tracker = MLflowTracker(store, run_id, config.tracking, folder=folder)
        _describe(tracker, recorded or config, folder, diff, datasets)
    except BaseException:
        store.client.set_terminated(run_id, RunStatus.FAILED)
        raise
    return tracker


def _describe(
    tracker: MLflowTracker,
    config: Config | Mapping[str, Any],
    folder: RunFolder,
    diff: str,
    datasets: Sequence[DatasetRecord],
) -> None:
    """Records what a run is made of."""
    tracker.params(dict(flatten(config)))
    tracker.artifact(folder.config)
    if diff:
        folder.code_diff.write_text(diff)
        tracker.artifact(folder.code_diff)
    for record in datasets:
        tracker.dataset(record)
