"""What a report reads: a sweep and its jobs, from the tracking store, or from its folder without one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..config.loading import flatten
from ..run.spec import CONFIG
from ..sweeps.sweep import summaries
from ..tracking import PastRun, Store, curve, jobs_of
from ..tracking.journal import METRICS, read

Curve = list[tuple[int, float]]
FINISHED = "FINISHED"
CERTIFICATE = "accumexp.certificate"


@dataclass(frozen=True)
class Job:
    """One job of a sweep: what was asked, what became of it, and what it measured.

    Attributes:
        overrides: the job's part of the command line, key to value.
        params: the resolved configuration, dotted keys, values as text.
        final: `final/*` without the prefix.
        curve: (update, value) of a metric's points.
    """

    run_id: str | None
    status: str
    overrides: dict[str, str]
    params: dict[str, str] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    started: float = 0.0
    error: str | None = None
    curve: Callable[[str], Curve] = field(default=lambda key: [], repr=False, compare=False)

    @property
    def seed(self) -> int:
        return int(self.params.get("seed", self.overrides.get("seed", "0")))

    def number(self, key: str, default: int = 1) -> int:
        """A whole number of the configuration."""
        value = self.params.get(key, "")
        return int(value) if value.lstrip("-").isdigit() else default

    @property
    def certificate(self) -> str | None:
        """The line that says whether the job's window is the larger batch; None if nobody looked."""
        return " ".join(self.tags.get(CERTIFICATE, "").split()) or None

    @property
    def said(self) -> str:
        """The job's overrides as they were written."""
        return " ".join(f"{key}={value}" for key, value in self.overrides.items())


@dataclass(frozen=True)
class Sweep:
    """A sweep: its identity and its jobs, each once, the finished attempt of a job before others of it.

    Attributes:
        folder: where it was written, if that is on this machine.
        store, run_id: its record, None without one.
        seconds: from the start of the first job to the end of the last.
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

    @property
    def finished(self) -> list[Job]:
        return [job for job in self.jobs if job.status == FINISHED]

    @property
    def unfinished(self) -> list[Job]:
        return [job for job in self.jobs if job.status != FINISHED]


def from_store(store: Store, parent: PastRun, folder: Path | None = None) -> Sweep:
    """The sweep that `parent` is the record of; jobs that never had a run come from its folder.

    Args:
        folder: where that is now, if it is not where the sweep was run.
    """
    folder = folder or Path(parent.tags.get("accumexp.folder", ""))
    here = folder if folder.is_dir() and folder.is_absolute() else None
    written = {job["run_id"]: job for job in summaries(here) if job.get("run_id")} if here else {}
    runs = jobs_of(store, parent)
    jobs = told_apart([_from_run(store, run, written.get(run.run_id, {})) for run in runs])
    known = {frozenset(job.overrides.items()) for job in jobs}
    if here:
        others = [_from_summary(job) for job in summaries(here)]
    else:
        others = [_refused(**entry) for entry in json.loads(parent.tags.get("accumexp.refused", "[]"))]
    jobs += [job for job in others if frozenset(job.overrides.items()) not in known]
    ends = [run.ended for run in runs if run.ended]
    started = min((run.started for run in runs), default=parent.started)
    return Sweep(
        name=parent.name,
        command=parent.tags.get("accumexp.command", ""),
        status=parent.status,
        jobs=once(jobs),
        folder=here,
        store=store,
        run_id=parent.run_id,
        started=started,
        seconds=max(ends, default=started) - started,
    )


def from_folder(folder: Path) -> Sweep:
    """A sweep that was run without tracking, from what its jobs left in `folder`."""
    known = summaries(folder)
    jobs = [_from_summary(job) for job in known]
    times, begun = (
        [path.stat().st_mtime for job in known if (path := Path(job["folder"], name)).exists()]
        for name in (METRICS, CONFIG)
    )
    started = min(begun, default=0.0)
    return Sweep(
        name=f"sweep {folder.name}",
        command="",
        status="",
        jobs=once(jobs),
        folder=folder,
        started=started,
        seconds=max(times, default=started) - started,
    )


def once(jobs: Iterable[Job]) -> list[Job]:
    """Each job once: of several attempts a finished one, else the newest."""
    best: dict[frozenset[tuple[str, str]], Job] = {}
    for job in jobs:
        key = frozenset(job.overrides.items())
        other = best.get(key)
        if other is None or (job.status == FINISHED, job.started) > (other.status == FINISHED, other.started):
            best[key] = job
    return list(best.values())


def parsed(overrides: Iterable[str]) -> dict[str, str]:
    """Overrides as key and value; a deletion (`~key`) has the value "deleted"."""
    found = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        found[key.lstrip("+")] = value if equals else "deleted"
    return found


def told_apart(jobs: list[Job]) -> list[Job]:
    """Jobs that nobody knows the overrides of, with the params instead that vary over them."""
    unknown = [job for job in jobs if not job.overrides]
    if len(unknown) < 2:
        return jobs
    keys = sorted({key for job in unknown for key in job.params})
    varied = [key for key in keys if len({job.params.get(key) for job in unknown}) > 1]
    return [
        job
        if job.overrides
        else replace(job, overrides={key: job.params[key] for key in varied if key in job.params})
        for job in jobs
    ]


def _from_run(store: Store, run: PastRun, summary: dict) -> Job:
    overrides = summary.get("overrides", [])
    if "accumexp.overrides" in run.tags:
        overrides = json.loads(run.tags["accumexp.overrides"])
    return Job(
        run_id=run.run_id,
        status=run.status,
        overrides=parsed(overrides),
        params=run.params,
        final={key[6:]: value for key, value in run.metrics.items() if key.startswith("final/")},
        tags=run.tags,
        started=run.started,
        error=None if run.status == FINISHED else run.tags.get("accumexp.error") or summary.get("error"),
        curve=lambda key: curve(store, run.run_id, key) if key in run.metrics else [],
    )


def _from_summary(summary: dict) -> Job:
    folder = Path(summary["folder"])
    params: dict[str, str] = {}
    if (folder / CONFIG).exists():
        saved = OmegaConf.load(folder / CONFIG)
        assert isinstance(saved, DictConfig)
        params = {key: str(value) for key, value in flatten(OmegaConf.to_container(saved))}

    def points(key: str) -> Curve:
        rows = read(folder / METRICS) if (folder / METRICS).exists() else ()
        return [(row["update"], row[key]) for row in rows if key in row]

    return Job(
        run_id=summary.get("run_id"),
        status=summary["status"],
        overrides=parsed(summary["overrides"]),
        params=params,
        final=summary.get("final", {}),
        tags=summary.get("tags", {}),
        started=os.stat(folder).st_ctime,
        error=summary.get("error"),
        curve=points,
    )


def _refused(overrides: list[str], error: str | None) -> Job:
    return Job(run_id=None, status="FAILED", overrides=parsed(overrides), error=error)
