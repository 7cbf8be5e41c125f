"""The record of a run: its folder always, the tracker if there is one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..accum import Inequality
from ..config.loading import flatten
from ..config.schema import Backend, Config
from ..environment.code_version import code_version
from ..environment.device import device_name, tf32
from .folder import CHECKPOINTS, RunFolder, RunStatus, Summary
from .journal import Journal, ProgressFile
from .run import MLflowTracker, Tracker
from .store import Store

if TYPE_CHECKING:
    from ..data.digest import DatasetRecord


@dataclass(frozen=True)
class KeptCheckpoint:
    """A checkpoint of a run that has ended.

    Attributes:
        evaluated: the values of `eval/*` at its update, empty if it was not evaluated.
        shards: the folder of its parts, None for a checkpoint in one file.
    """

    path: Path
    update: int
    evaluated: Mapping[str, float]
    shards: Path | None


class RunRecord:
    """The metrics sink of a run: a journal in its folder, and a tracker that gets the published points.

    Attributes:
        tags: those of the MLflow run that describe how it was computed.
    """

    def __init__(self, folder: RunFolder, upto: int = 0) -> None:
        self.folder = folder
        self.journal = Journal(folder.metrics, upto)
        self.tracker = Tracker()
        self.progress: ProgressFile | None = None
        self.tags: dict[str, str] = {}

    def record(self, update: int, values: Mapping[str, float], publish: bool) -> None:
        self.journal.write(update, values)
        if publish:
            self.tracker.log(update, values)
            if self.progress:
                self.progress.write(update, values)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Adds tags that were not known when the run began."""
        self.tags.update(tags)
        self.tracker.tag(tags)

    def flush(self) -> None:
        self.journal.flush()
        self.tracker.flush()

    def summarise(self, summary: Summary) -> None:
        """Writes `summary.json`."""
        self.folder.write_summary(summary)

    def upload(self, checkpoints: Sequence[KeptCheckpoint]) -> None:
        """Hands the checkpoints and the journal to the tracker."""
        self.flush()
        for kept in checkpoints:
            self.tracker.checkpoint(kept.path, kept.update, kept.evaluated)
            if kept.shards is not None:
                self.tracker.artifact(kept.shards, CHECKPOINTS)
        self.tracker.artifact(self.folder.metrics)

    def close(self, status: RunStatus) -> None:
        self.flush()
        self.journal.close()
        self.tracker.end(status)


class NullRecord(RunRecord):
    """The record of a rank that is not the first: nothing is kept."""

    def __init__(self) -> None:
        self.tracker = Tracker()
        self.tags = {}

    def record(self, update: int, values: Mapping[str, float], publish: bool) -> None: ...

    def flush(self) -> None: ...

    def summarise(self, summary: Summary) -> None: ...

    def upload(self, checkpoints: Sequence[KeptCheckpoint]) -> None: ...

    def close(self, status: RunStatus) -> None: ...


def describing_tags(device: torch.device, unequal: Sequence[Inequality]) -> dict[str, str]:
    """Tags of what a run is computed on, and of why its window cannot be the larger batch."""
    return {
        "accumexp.device": device_name(device),
        "accumexp.torch": torch.__version__,
        "accumexp.tf32": str(tf32(device)).lower(),
        **inequality_tag(unequal),
    }


def inequality_tag(unequal: Sequence[Inequality]) -> dict[str, str]:
    """The tag of why a window cannot be the larger batch, if it cannot."""
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
    overrides: Sequence[str] | None = None,
    parent: str | None = None,
) -> Tracker:
    """Creates the MLflow run, with everything that is known before the first update.

    Args:
        overrides: the job's part of the command line, None outside a sweep.
        parent: the id of the sweep's parent run.
    """
    if config.tracking.backend is Backend.none or store is None:
        return Tracker()
    if overrides is not None:
        store.close_left_open(folder.path)
    sha, diff = code_version()
    tags = {
        "accumexp.command": command,
        "accumexp.git_sha": sha,
        **tags,
        "accumexp.folder": str(folder.path),
        **({} if overrides is None else {"accumexp.overrides": json.dumps(overrides)}),
        "mlflow.source.git.commit": sha,
        **config.tracking.tags,
    }
    if parent:
        tags["mlflow.parentRunId"] = parent
    run_id = store.create_run(config.tracking.run_name or name, tags)
    try:
        tracker = MLflowTracker(store, run_id, config.tracking)
        _describe(tracker, config, folder, diff, datasets)
    except BaseException:
        store.client.set_terminated(run_id, RunStatus.FAILED)
        raise
    return tracker


def _describe(
    tracker: MLflowTracker, config: Config, folder: RunFolder, diff: str, datasets: Sequence[DatasetRecord]
) -> None:
    """Records what a run is made of."""
    tracker.params(dict(flatten(config)))
    tracker.artifact(folder.config)
    if diff:
        folder.code_diff.write_text(diff)
        tracker.artifact(folder.code_diff)
    for data in datasets:
        profile = json.dumps({"samples": data.samples})
        tracker.dataset(data.name, data.digest, data.source, data.context, profile)
