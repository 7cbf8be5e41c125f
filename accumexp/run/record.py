"""What is kept of a run: in its folder always, in the tracker if there is one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ..accum import Inequality
from ..accum.batch import map_tensors, tensors
from ..config.loading import flatten, to_plain
from ..config.schema import Backend, Config
from ..data import Batches, ResidentBatches
from ..environment.code_version import code_version
from ..environment.device import device_name, tf32
from ..tracking import MLflowTracker, Store, Tracker
from ..tracking.journal import METRICS, SUMMARY, Journal, ProgressFile, write_whole
from ..training.checkpoint import BEST, FOLDER, load, saved_updates
from ..training.experiment import Experiment
from ..training.shards import folder_of
from .spec import CONFIG, RunSpec


class RunRecord:
    """The trainer's recorder: a journal in the run's folder, and a tracker that gets what is published."""

    def __init__(self, folder: Path, upto: int = 0) -> None:
        self.folder = folder
        self.journal = Journal(folder / METRICS, upto)
        self.tracker = Tracker()
        self.progress: ProgressFile | None = None
        self.tags: dict[str, str] = {}

    def record(self, update: int, values: Mapping[str, float], publish: bool) -> None:
        self.journal.write(update, values)
        if publish:
            self.tracker.log(update, values)
            if self.progress:
                self.progress.tell(update, values)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Says of the run what was not known when it began."""
        self.tags.update(tags)
        self.tracker.tag(tags)

    def flush(self) -> None:
        self.journal.flush()
        self.tracker.flush()

    def summarise(self, **entries: Any) -> None:
        """Writes `summary.json`."""
        write_whole(self.folder / SUMMARY, entries)

    def upload(self) -> None:
        """Hands the kept checkpoints and the journal to the tracker."""
        self.flush()
        kept = saved_updates(self.folder / FOLDER)
        best = self.folder / FOLDER / BEST
        seen: set[int] = set()
        for path in [*([best] if best.exists() else []), *reversed(kept)]:
            content = load(path)
            update = content["progress"]["update"]
            if update not in seen:
                self.tracker.checkpoint(path, update, content["evaluated"])
                parts = folder_of(path, content)
                if parts is not None:
                    self.tracker.artifact(parts, "checkpoints")
                seen.add(update)
        self.tracker.artifact(self.folder / METRICS)

    def close(self, status: str) -> None:
        self.flush()
        self.journal.close()
        self.tracker.end(status)


def write_config(folder: Path, config: Config) -> Path:
    path = folder / CONFIG
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(to_plain(config))))
    return path


class SilentRecord(RunRecord):
    """The record of a rank that is not the first: none."""

    def __init__(self) -> None:
        self.tracker = Tracker()
        self.tags = {}

    def record(self, update: int, values: Mapping[str, float], publish: bool) -> None: ...

    def flush(self) -> None: ...

    def summarise(self, **entries: Any) -> None: ...

    def upload(self) -> None: ...

    def close(self, status: str) -> None: ...


def described(experiment: Experiment, unequal: list[Inequality]) -> dict[str, str]:
    """Tags of what a run is computed on, and of why its window cannot be the larger batch."""
    tags = {
        "accumexp.device": device_name(experiment.device),
        "accumexp.torch": torch.__version__,
        "accumexp.tf32": str(tf32(experiment.device)).lower(),
    }
    return {**tags, **why_unequal(unequal)}


def why_unequal(unequal: list[Inequality]) -> dict[str, str]:
    """The tag of why a window cannot be the larger batch, if it cannot."""
    reasons = "; ".join(f"{u.module} ({u.kind}): {u.reason}" for u in unequal)
    return {"accumexp.unequal": reasons[:5000]} if unequal else {}


def open_tracker(
    spec: RunSpec,
    store: Store | None,
    experiment: Experiment,
    known: Mapping[str, str],
    name: str | None,
    parent: str | None,
) -> Tracker:
    """A new MLflow run that holds all that is known before the first update; `known` are tags."""
    config, folder = spec.config, spec.folder
    if config.tracking.backend is Backend.none or store is None:
        return Tracker()
    if spec.job:
        store.close_left_open(folder)
    sha, diff = code_version()
    tags = {
        "accumexp.command": spec.command,
        "accumexp.git_sha": sha,
        **known,
        "accumexp.folder": str(folder),
        **({"accumexp.overrides": json.dumps(spec.job.overrides)} if spec.job else {}),
        "mlflow.source.git.commit": sha,
        **config.tracking.tags,
    }
    if parent:
        tags["mlflow.parentRunId"] = parent
    run_id = store.create_run(config.tracking.run_name or name, tags)
    tracker = MLflowTracker(store, run_id, config.tracking)
    tracker.params(dict(flatten(config)))
    tracker.artifact(folder / CONFIG)
    if diff:
        (folder / "code.diff").write_text(diff)
        tracker.artifact(folder / "code.diff")
    for context, node, batches in (
        ("train", config.data.train, experiment.splits.train),
        ("eval", config.data.eval or config.data.train, experiment.splits.eval),
        ("test", config.data.test, experiment.splits.test),
    ):
        source = json.dumps(to_plain(node))
        profile = json.dumps({"samples": batches.samples})
        tracker.dataset(_dataset_name(node), digest(source, batches), source, context, profile)
    return tracker


def digest(source: str, batches: Batches) -> str:
    """32 bits of a hash: of the data set's description and its samples' indices, and of the samples
    themselves (all targets and 64 inputs) where they are in memory."""
    found = hashlib.blake2b(source.encode(), digest_size=4)
    found.update(batches.indices.numpy().tobytes())
    if isinstance(batches, ResidentBatches):
        first = map_tensors(lambda tensor: tensor[:64], batches.inputs)
        for tensor in [*tensors(batches.targets), *tensors(first)]:
            found.update(tensor.detach().cpu().double().contiguous().numpy().tobytes())
    return found.hexdigest()


def _dataset_name(node: Mapping[str, Any]) -> str:
    return str(node["_target_"]).rpartition(".")[2].lower()
