"""The folder of a run: its file names, its status and its locks. Imports no torch."""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from ..config.loading import to_plain
from ..config.schema import Config
from ..errors import UsageError
from .json_file import read_json, write_json
from .metrics_file import last_update
from .yaml_file import read_yaml

CHECKPOINTS = "checkpoints"
BEST = "best.pt"
UNSENT = "unsent.jsonl"
# Of the process that works on a run or job, of the ranks that it started, and of a sweep's launcher.
JOB_LOCKS = (".job.lock", ".ranks.lock")
LAUNCH_LOCK = ".launch.lock."
CERTIFICATE_TAG = "accumexp.certificate"
# Seconds that the children of a killed process may outlive it.
DYING = 10.0


class RunStatus(StrEnum):
    """The status of a run, in `summary.json` and in MLflow."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


# Of the fields of a summary: a type, or those of a container and of what it holds.
SUMMARY_TYPES: dict[str, Any] = {
    "status": str,
    "error": str | None,
    "overrides": (list, str),
    "seed": int | None,
    "run_id": str | None,
    "final": (dict, int | float | None),
    "best": (dict, int | float | None),
    "monitored": int | float | None,
    "launch": int,
    "tags": (dict, str),
    "replicas": (list, str),
}


def _is_of(value: Any, kind: Any) -> bool:
    if not isinstance(kind, tuple):
        return isinstance(value, kind)
    container, held = kind
    children = value.values() if isinstance(value, dict) else value
    return isinstance(value, container) and all(isinstance(child, held) for child in children)


@dataclass
class Summary:
    """The content of `summary.json`.

    Attributes:
        error: the reason of a failed run.
        overrides: the job's part of the command line, empty outside a sweep.
        final: `final/*` without the prefix, empty until the run has finished.
        best: `final/best_*` without the prefix: the best checkpoint's loss and metrics on the test split.
        monitored: the newest value of the monitored metric.
        launch: the launch of the sweep that ran the job, 0 for the first.
        tags: the tags of the MLflow run that describe how it was computed.
        replicas: of a job of many seeds, the names of its runs' folders.
    """

    status: RunStatus
    error: str | None = None
    overrides: list[str] = field(default_factory=list)
    seed: int | None = None
    run_id: str | None = None
    final: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    monitored: float | None = None
    launch: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    replicas: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> Summary | None:
        """The summary with these entries; None if they have no valid status."""
        if entries.get("status") not in list(RunStatus):
            return None
        values = {item.name: entries[item.name] for item in fields(cls) if item.name in entries}
        if not all(_is_of(value, SUMMARY_TYPES[name]) for name, value in values.items()):
            return None
        return cls(**{**values, "status": RunStatus(entries["status"])})

    @property
    def finished(self) -> bool:
        return self.status is RunStatus.FINISHED


@dataclass
class RunFolder:
    """The files of the run in `path`.

    Attributes:
        config: the resolved configuration.
        metrics: every logged point, a line per update.
        progress: the progress of a job of a parallel sweep.
        unsent: what the store has not got yet; there is none once it has all.
        model_inputs: the signature and the input example of its logged models.
        code_diff: uncommitted changes of the code that was run.
    """

    path: Path

    def __post_init__(self) -> None:
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.progress = self.path / "progress.json"
        self.unsent = self.path / UNSENT
        self.certificate = self.path / "certificate.json"
        self.certificate_page = self.path / "certificate.html"
        self.certificate_pictures = {n: self.path / f"certificate-{n}.png" for n in ("errors", "counts")}
        self.model_inputs = self.path / "model_inputs.json"
        self.code_diff = self.path / "code.diff"
        self.log = self.path / "run.log"
        self.summary_file = self.path / "summary.json"
        self.checkpoints = self.path / CHECKPOINTS
        self.best = self.checkpoints / BEST
        self._job_lock = self.path / JOB_LOCKS[0]
        self._ranks_lock = self.path / JOB_LOCKS[1]
        self._holder = self.path / ".holder.json"

    @classmethod
    def of_checkpoint(cls, path: Path) -> RunFolder:
        """The folder of the run that wrote the checkpoint `path`."""
        return cls(path.parent.parent)

    def summary(self) -> Summary | None:
        """The summary; None if there is none, or it is damaged."""
        return Summary.of(read_json(self.summary_file))

    def write_summary(self, summary: Summary) -> None:
        # The fields of a summary alone: a sweep's run has the folders that it lies in besides.
        write_json(self.summary_file, {one.name: getattr(summary, one.name) for one in fields(Summary)})

    def write_config(self, config: Config | Mapping[str, Any]) -> None:
        self.config.write_text(OmegaConf.to_yaml(OmegaConf.create(to_plain(config))))

    def read_config(self) -> DictConfig | None:
        """The configuration as it was written; None if there is none.

        Raises:
            UsageError: if it is damaged.
        """
        return read_yaml(self.config) if self.config.exists() else None

    def proved(self) -> bool:
        """Whether the certificate in the folder has another verdict than `not proved`."""
        return json.loads(self.certificate.read_text())["verdict"] != "not proved"

    def check_unused(self, key: str) -> None:
        """
        Raises:
            UsageError: naming `key`, which gives this folder, if it holds a run already.
        """
        if self.summary_file.exists() or self.metrics.exists() or self.checkpoints.exists():
            kept = any(self.checkpoints.glob("*.pt"))
            remedy = f"go on with it by resume={self.path}, or " if kept else "it has no checkpoint, "
            raise UsageError(f"{key}={self.path}: holds a run already; {remedy}give another folder")

    def clear(self) -> None:
        """Removes the files of an earlier run; `run.log` is kept."""
        for path in (self.summary_file, self.metrics, self.progress, self.unsent, self.code_diff):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def remove_unused(self) -> None:
        """Removes the folder if it holds only what a refused command leaves."""
        locks = {path.name for path in (self._job_lock, self._ranks_lock, self._holder)}
        names = {".hydra", self.log.name, self.metrics.name, self.unsent.name, *locks}
        if not self.path.is_dir() or not {entry.name for entry in self.path.iterdir()} <= names:
            return
        if not self.metrics.exists() or not self.metrics.stat().st_size:
            shutil.rmtree(self.path, ignore_errors=True)

    def held(self) -> bool:
        """Whether a running process works on the run or job in this folder."""
        try:
            for lock in (self._job_lock, self._ranks_lock):
                if lock.exists():
                    with FileLock(lock, timeout=0):
                        pass
        except Timeout:
            return True
        return False

    def launch_lock(self, launch: int) -> FileLock:
        """The lock that the process that launches the sweep in this folder holds, one a launch."""
        return FileLock(self.path / f"{LAUNCH_LOCK}{launch}")

    def sweep_is_dead(self, job: Path | None = None) -> bool:
        """Whether no process launches the sweep in this folder, or works on one of its jobs.

        Args:
            job: the folder of a job of this process, whose sweep may be launched from another machine.
        """
        if not self.path.is_dir() or job and job.is_relative_to(self.path):
            return False
        try:
            for lock in self.path.glob(f"{LAUNCH_LOCK}*"):
                with FileLock(lock, timeout=0):
                    pass
        except Timeout:
            return False
        jobs = {lock.parent for name in JOB_LOCKS for lock in self.path.rglob(name)}
        return not any(RunFolder(job).held() for job in jobs)

    def check_free(self, key: str) -> None:
        """
        Raises:
            UsageError: naming `key`, which gives this folder, and the process that works on the run in it.
        """
        if self.held():
            raise UsageError(
                f"{key}={self.path}: {self._described_holder()} works on this run; wait for its end"
            )

    @contextmanager
    def hold_alone(self, key: str) -> Iterator[None]:
        """Holds the run's lock, which the system releases however its holder ends.

        Raises:
            UsageError: as `check_free`.
        """
        end = time.monotonic() + DYING
        while self.held() and self._holder_is_dead() and time.monotonic() < end:
            time.sleep(0.1)  # its data workers, which see its end within seconds
        self.check_free(key)
        lock = FileLock(self._job_lock)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.check_free(key)
            raise
        with lock:
            write_json(self._holder, {"process": os.getpid(), "host": platform.node()})
            self._remove_partial()
            try:
                yield
            finally:
                for path in (self._holder, self._ranks_lock, self._job_lock):
                    with suppress(OSError):
                        path.unlink(missing_ok=True)

    def close_if_dead(self) -> bool:
        """Marks a run as KILLED in its summary that is RUNNING there and on which no process works.

        A replica's folder lies in its job's, which holds the lock. A run that was killed before its first
        update has no summary yet, one that was killed as it was resumed an older one. Returns whether it has
        not finished and nobody works on it.
        """
        summary = self.summary()
        if summary and summary.finished or not self.path.is_dir():
            return False
        if self.held() or RunFolder(self.path.parent).held():
            return False
        self._remove_partial()
        if summary is None or summary.status is not RunStatus.RUNNING:
            return True
        summary.status, summary.error = RunStatus.KILLED, f"killed after update {last_update(self.metrics)}"
        self.write_summary(summary)
        return True

    def _holder_is_dead(self) -> bool:
        holder = read_json(self._holder)
        here = holder.get("host") == platform.node() and "process" in holder
        return here and not psutil.pid_exists(int(holder["process"]))

    def _described_holder(self) -> str:
        holder = read_json(self._holder)
        if "process" not in holder:
            return "another process"
        elsewhere = holder.get("host") not in (None, platform.node())
        return f"process {holder['process']}" + (f" on {holder['host']}" if elsewhere else "")

    def _remove_partial(self) -> None:
        """Removes the temporary files of a process that was killed while it wrote."""
        for folder in (self.path, self.checkpoints):
            for partial in folder.glob("*.partial"):  # hidden files, too
                partial.unlink(missing_ok=True)

    @contextmanager
    def hold(self, title: str) -> Iterator[None]:
        """Holds the job's lock; waits, with a line that names `title`, while another process holds it.

        The system releases the lock however its holder ends. A job may outlive its sweep's launcher, in a
        worker or in the ranks that the worker started.
        """
        if self.held():
            print(f"{title}: still runs in another process, waiting for it", flush=True)
        with FileLock(self._job_lock):
            with self.hold_for_ranks():
                pass
            yield

    def hold_for_ranks(self) -> FileLock:
        """The lock of a job's ranks, which may outlive the process that started them."""
        return FileLock(self._ranks_lock)
