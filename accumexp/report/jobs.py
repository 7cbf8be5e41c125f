"""The input of a report: a sweep and its jobs, read from the tracking store or from the sweep's folder."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import OmegaConf

from ..config.loading import flatten
from ..config.schema import TrackingConfig
from ..errors import UsageError
from ..sweeps.hydra_sweep import file_arguments
from ..sweeps.job_folders import launches
from ..sweeps.sweep import PARENT, SweepRun, parent_of, sweep_runs
from ..tracking import PastRun, Store, curve, jobs_of, newest_sweep, sweep_of
from ..tracking.json_file import read_json
from ..tracking.metrics_file import read
from ..tracking.run_folder import CERTIFICATE_TAG, RunFolder, RunStatus, Summary

Curve = list[tuple[int, float]]
REMEDY = "give sweep=<folder or parent run id>, or tracking.uri=<the store's address>"


@dataclass(frozen=True)
class Job:
    """One job of a sweep: its configuration, status and metrics.

    Attributes:
        overrides: of this job in the sweep, key to value.
        typed: the overrides as they were given, empty if they are inferred.
        params: the resolved configuration, dotted keys, values as text.
        final: the metrics `final/*`, keys without the prefix.
        started: seconds since 1970.
        curve: maps a metric's key to its points, (update, value).
    """

    run_id: str | None
    status: str
    overrides: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    started: float = 0.0
    error: str | None = None
    typed: list[str] = field(default_factory=list)
    curve: Callable[[str], Curve] = field(default=lambda key: [], repr=False, compare=False)

    @property
    def finished(self) -> bool:
        return self.status == RunStatus.FINISHED

    @property
    def seed(self) -> int:
        return int(self.params.get("seed", self.overrides.get("seed", "0")))

    def number(self, key: str, default: int = 1) -> int:
        """The integer parameter `key`; `default` if it is missing or not an integer."""
        value = self.params.get(key, "")
        return int(value) if value.lstrip("-").isdigit() else default

    @property
    def certificate(self) -> str | None:
        """The certificate of the job's window, as one line; None if the job was not certified."""
        return " ".join(self.tags.get(CERTIFICATE_TAG, "").split()) or None

    @property
    def overrides_text(self) -> str:
        """The overrides as on a command line."""
        return " ".join(f"{key}={value}" for key, value in self.overrides.items())


@dataclass(frozen=True)
class Sweep:
    """A sweep and its jobs, one attempt per job.

    Attributes:
        folder: the sweep's folder; None if it is not on this machine.
        store, run_id: the parent run; None for a sweep without tracking.
        started: start of the first job, in seconds since 1970.
        seconds: from the start of the first job to the end of the last.
        files: chooses the files its jobs are composed from, see `hydra_sweep.file_arguments`.
    """

    name: str
    command: str
    status: str
    jobs: list[Job]
    folder: Path | None = None
    store: Store | None = None
    run_id: str | None = None
    started: float = 0.0
    seconds: float = 0.0
    files: list[str] = field(default_factory=list)

    @property
    def finished(self) -> list[Job]:
        return [job for job in self.jobs if job.finished]

    @property
    def unfinished(self) -> list[Job]:
        return [job for job in self.jobs if not job.finished]


def find_sweep(sweep: str, uri: str = "") -> Sweep:
    """Reads a sweep, or raises a `UsageError` if there is none.

    Args:
        sweep: its folder, or the id of its parent run or of a job; empty for the newest in the store.
        uri: of the store; empty for that of the sweep's folder, else `mlflow.db` in the current folder.
    """
    folder = Path(sweep)
    if sweep and folder.is_dir():
        return _find_in_folder(folder.resolve(), uri)
    if sweep and "/" in sweep:
        raise UsageError(f"sweep={sweep}: no such folder")
    return _find_in_store(uri, sweep)


def _find_in_folder(folder: Path, uri: str) -> Sweep:
    if (folder / PARENT).exists():
        if uri:
            return _find_in_store(uri, str(read_json(folder / PARENT).get("run_id", "")), folder)
        parent = parent_of(folder)
        return _find_in_store(parent["uri"], parent["run_id"], folder)
    if sweep_runs(folder):
        return from_folder(folder)
    if RunFolder(folder).config.exists():
        raise UsageError(f"sweep={folder}: is a single run's folder; a sweep's is needed")
    raise UsageError(f"sweep={folder}: no sweep has been run in this folder; {REMEDY}")


def _find_in_store(uri: str, run_id: str, folder: Path | None = None) -> Sweep:
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("sqlite:///") or not uri:
        database = Path(uri.removeprefix("sqlite:///") or "mlflow.db")
        if not database.exists():  # opening the store would create it
            raise UsageError(f"sweep: there is no {database.name} in {database.parent.absolute()}; {REMEDY}")
    # With an experiment id, the store does not create an experiment. The sweep's own replaces it.
    store = Store(TrackingConfig(uri=uri or None), "0")
    parent = sweep_of(store, run_id) if run_id else newest_sweep(store)
    if parent is None:
        raise UsageError(f"sweep: {store.uri} has none yet; {REMEDY}")
    store.experiment_id = parent.experiment_id
    store.close_dead_runs()
    return from_store(store, sweep_of(store, parent.run_id), folder)


def from_store(store: Store, parent: PastRun, folder: Path | None = None) -> Sweep:
    """Reads the sweep of a parent run, and its jobs without a run from `folder`, by default where it ran."""
    folder = folder or Path(parent.tags.get("accumexp.folder", ""))
    local = folder if folder.is_dir() and folder.is_absolute() else None
    local_runs = sweep_runs(local) if local else []
    by_run_id = {run.run_id: run for run in local_runs if run.run_id}
    runs = jobs_of(store, parent)
    jobs = infer_overrides([_from_run(store, run, by_run_id.get(run.run_id)) for run in runs])
    with_run = {_identity(job.overrides) for job in jobs}
    if local:
        left = (run for run in local_runs if _identity(parse_overrides(run.overrides)) not in with_run)
        jobs += map(_from_summary, left)
    else:
        refused = json.loads(parent.tags.get("accumexp.refused", "[]"))
        others = [
            Job(None, "FAILED", parse_overrides(entry["overrides"]), error=entry["error"])
            for entry in refused
        ]
        jobs += [job for job in others if _identity(job.overrides) not in with_run]
    ends = [run.ended for run in runs if run.ended]
    started = min((run.started for run in runs), default=parent.started)
    command = parent.tags.get("accumexp.command", "")
    return Sweep(
        name=parent.name,
        command=command,
        status=parent.status,
        jobs=best_attempts(jobs),
        folder=local,
        store=store,
        run_id=parent.run_id,
        started=started,
        seconds=max(ends, default=started) - started,
        files=_files(local) or file_arguments(_words(command)),
    )


def from_folder(folder: Path) -> Sweep:
    """Reads a sweep that was run without tracking from the job folders in `folder`."""
    for run in sweep_runs(folder):
        RunFolder(run.folder).close_if_dead()
    runs = sweep_runs(folder)
    folders = [RunFolder(run.folder) for run in runs]
    ends = [path.stat().st_mtime for path in (job.metrics for job in folders) if path.exists()]
    starts = [path.stat().st_mtime for path in (job.config for job in folders) if path.exists()]
    started = min(starts, default=0.0)
    return Sweep(
        name=f"sweep {folder.name}",
        command="",
        status="",
        jobs=best_attempts(_from_summary(run) for run in runs),
        folder=folder,
        started=started,
        seconds=max(ends, default=started) - started,
        files=_files(folder),
    )


def _files(folder: Path | None) -> list[str]:
    """What the newest launch in a sweep's folder was composed from; empty without a readable list of them."""
    with suppress(UsageError):
        for _, launch in sorted(launches(folder).items() if folder else (), reverse=True):
            return file_arguments([*launch.files, *launch.hydra])
    return []


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # a quote that is not closed
        return []


def best_attempts(jobs: Iterable[Job]) -> list[Job]:
    """One attempt per job: the newest finished one, or the newest if none has finished."""
    attempts: dict[frozenset[tuple[str, str]], list[Job]] = {}
    for job in jobs:
        attempts.setdefault(_identity(job.overrides), []).append(job)
    return [max(group, key=lambda job: (job.finished, job.started)) for group in attempts.values()]


def _identity(overrides: dict[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(overrides.items())


def parse_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """Maps the key of each override to its value, and of each deletion (`~key`) to "deleted"."""
    values = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        values[key.lstrip("+")] = value if equals else "deleted"
    return values


def infer_overrides(jobs: list[Job]) -> list[Job]:
    """Replaces missing overrides by the params that vary over the jobs without overrides."""
    without = [job for job in jobs if not job.overrides]
    if len(without) < 2:
        return jobs
    keys = sorted({key for job in without for key in job.params})
    varied = [key for key in keys if len({job.params.get(key) for job in without}) > 1]
    return [
        job
        if job.overrides
        else replace(job, overrides={key: job.params[key] for key in varied if key in job.params})
        for job in jobs
    ]


def _from_run(store: Store, run: PastRun, summary: Summary | None) -> Job:
    overrides = summary.overrides if summary else []
    if "accumexp.overrides" in run.tags:
        overrides = json.loads(run.tags["accumexp.overrides"])
    finished = run.status == RunStatus.FINISHED
    return Job(
        run_id=run.run_id,
        status=run.status,
        overrides=parse_overrides(overrides),
        typed=overrides,
        params=run.params,
        final={key[6:]: value for key, value in run.metrics.items() if key.startswith("final/")},
        tags=run.tags,
        started=run.started,
        error=None if finished else run.tags.get("accumexp.error") or (summary.error if summary else None),
        curve=lambda key: curve(store, run.run_id, key) if key in run.metrics else [],
    )


def _from_summary(run: SweepRun) -> Job:
    folder = RunFolder(run.folder)
    config = folder.read_config()
    params = {} if config is None else dict(flatten(OmegaConf.to_container(config)))

    def points(key: str) -> Curve:
        rows = read(folder.metrics) if folder.metrics.exists() else ()
        return [(row["update"], row[key]) for row in rows if key in row]

    return Job(
        run_id=run.run_id,
        status=run.status,
        overrides=parse_overrides(run.overrides),
        typed=run.overrides,
        params={key: str(value) for key, value in params.items()},
        final=run.final,
        tags=run.tags,
        started=os.stat(run.folder).st_ctime,
        error=run.error,
        curve=points,
    )
