"""The live view of a parallel sweep, read from the jobs' folders by the process that launched it.

Viewed jobs write to `output.log` in their folder instead of the terminal.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import Progress, ProgressColumn, Task, TextColumn
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from ..environment.console import VIEWED, console, duration, result
from ..tracking.json_file import read_json
from ..tracking.run_folder import RunFolder, RunStatus, Summary
from .job_folders import JOBS, JobFolder, job_folders, number_of

EVERY = 0.5  # seconds between two reads of the folder
SILENT = 30.0  # seconds without a point after which the view shows it; an evaluation may take as long
OTHER_LINES = 4  # of the view: the jobs that do not fit, the totals, the best, and the cursor's own


@dataclass
class ViewedJob:
    """A job of the viewed launch, as its folder was last read.

    Attributes:
        before: it had finished before this launch.
        progress: the content of its `progress.json`.
        summary: its summary, once it has ended.
    """

    place: JobFolder
    before: bool = False
    progress: dict[str, Any] = field(default_factory=dict)
    summary: Summary | None = None

    @property
    def running(self) -> bool:
        return self.summary is None

    @property
    def finished(self) -> bool:
        return self.summary is not None and self.summary.finished

    @property
    def number(self) -> int:
        return number_of(self.place.folder)

    @property
    def title(self) -> str:
        return f"job {self.place.folder.replace('_', ' ', 1)}"

    @property
    def share(self) -> float:
        """The share of its updates that are done, from 0 to 1."""
        if not self.running:
            return 1.0
        total = self.progress.get("total_updates")
        return self.progress["update"] / total if total else 0.0

    def result_line(self, monitor: str = "") -> str:
        """One line of how it ended; `monitor` is the metric that is shown besides accuracy and loss."""
        assert self.summary is not None
        if self.before:
            return f"{self.title}: finished before"
        if self.finished:
            return f"{self.title}: {result(self.summary.final, monitor)}"
        reason = self.summary.error or self.summary.status.lower()
        return f"{self.title}: {reason.splitlines()[0]}, see {self.place.folder}/run.log"


@dataclass
class ViewedSweep:
    """A sweep's folder as it was last read.

    Args:
        launch: the launch whose jobs are viewed.
        jobs: the number of its jobs, None if unknown.
        varied: the keys that differ between jobs; the view shows all overrides if there are none.
        monitor, mode: the metric whose best value is shown, and whether that is the "max" or the "min".
        began: when the launch began, in seconds since 1970.
    """

    folder: Path
    launch: int
    jobs: int | None
    varied: Sequence[str]
    monitor: str
    mode: str
    began: float
    by_number: dict[int, ViewedJob] = field(default_factory=dict)
    _bytes_read: int = 0  # of the list of job folders

    def read(self) -> list[ViewedJob]:
        """Reads the jobs that were running at the last read; returns those that have ended since."""
        path = self.folder / JOBS
        size = path.stat().st_size if path.exists() else 0
        if size != self._bytes_read:
            self._bytes_read = size
            for place in job_folders(self.folder):
                if place.launch == self.launch:
                    self.by_number.setdefault(place.number, ViewedJob(place))
        running = self.running()
        for job in running:
            self._read_job(job)
        return [job for job in running if not job.running]

    def _read_job(self, job: ViewedJob) -> None:
        folder = RunFolder(self.folder / job.place.folder)
        summary = folder.summary()
        # The end of an earlier launch's job that is about to be run again does not count.
        if summary and summary.status is not RunStatus.RUNNING:
            if summary.launch == self.launch or summary.finished:
                job.summary, job.before = summary, summary.launch != self.launch
        if job.running:
            progress = read_json(folder.progress)
            if progress.get("time", 0.0) >= job.place.time:
                job.progress = progress

    def running(self) -> list[ViewedJob]:
        return [job for job in self.by_number.values() if job.running]

    def best(self) -> tuple[float, ViewedJob] | None:
        """The best monitored value: of jobs at their end, and of running ones at their newest evaluation."""
        values = []
        for job in self.by_number.values():
            newest = job.progress.get("values", {}).get(self.monitor)
            value = job.summary.monitored if job.summary and job.finished else newest
            if value is not None and not math.isnan(value):
                values.append((value, job))
        best = max if self.mode == "max" else min
        return best(values, key=lambda one: one[0], default=None)

    def seconds_left(self, now: float) -> float | None:
        """From the jobs done per second so far; None before there are any."""
        done = sum(job.share for job in self.by_number.values() if not job.before)
        if self.jobs is None or not done:
            return None
        ahead = self.jobs - sum(job.share for job in self.by_number.values())
        return max(0.0, (now - self.began) * ahead / done)

    def name(self, job: ViewedJob) -> str:
        """The overrides that differ between jobs."""
        overrides = job.place.overrides
        varied = [one for one in overrides if one.partition("=")[0].lstrip("+") in self.varied]
        return " ".join(varied or overrides)


class _Bar(ProgressColumn):
    """A bar; nothing for a job that has made no update."""

    def render(self, task: Task) -> RenderableType:
        if not task.fields["updates"]:
            return ""
        return ProgressBar(total=task.total, completed=task.completed, width=20)


def render(sweep: ViewedSweep, now: float, height: int) -> RenderableType:
    """The view at time `now` (seconds since 1970), in at most `height` lines."""
    running = sorted(sweep.running(), key=lambda job: job.number)
    room = max(1, height - OTHER_LINES)
    one_line = Column(no_wrap=True, overflow="ellipsis")
    table = Progress(
        TextColumn("{task.fields[number]}", justify="right"),
        TextColumn(" {task.description} ", markup=False, table_column=copy(one_line)),
        _Bar(Column(width=20)),
        TextColumn(" {task.fields[updates]}", justify="right"),
        TextColumn(" {task.fields[loss]}"),
        TextColumn(" {task.fields[values]}", markup=False, table_column=one_line),
    )
    for job in running[:room]:
        fields = {"updates": "", "loss": "", "values": "starting", **_task_fields(sweep, job, now)}
        table.add_task(sweep.name(job), number=job.number, **fields)
    lines: list[RenderableType] = [table.get_renderable()] if running else []
    if len(running) > room:
        lines.append(Text(f"and {len(running) - room} more are running", style="dim"))
    lines.append(Text(totals(sweep, now), no_wrap=True, overflow="ellipsis"))
    best = sweep.best()
    if best:
        value, job = best
        so_far = " so far" if job.running else ""
        text = f"best {sweep.monitor} {value:.4f}{so_far}: job {job.number} {sweep.name(job)}"
        lines.append(Text(text, style="bold", no_wrap=True, overflow="ellipsis"))
    return Group(*lines)


def _task_fields(sweep: ViewedSweep, job: ViewedJob, now: float) -> dict[str, Any]:
    progress = job.progress
    if not progress:
        return {"completed": 0, "total": 1}
    update, total = progress["update"], progress["total_updates"]
    values: Mapping[str, float] = progress["values"]
    words = []
    if sweep.monitor in values:
        words.append(f"{sweep.monitor} {values[sweep.monitor]:.4f}")
    if "perf/update_ms" in values:
        words.append(f"{1e3 / max(values['perf/update_ms'], 1e-9):.1f} updates/s")
    if now - progress["time"] > SILENT:
        words.append(f"silent for {duration(now - progress['time'])}")
    loss = f"loss {values['train/loss']:.4f}" if "train/loss" in values else ""
    shown = {"updates": f"{update}/{total}", "loss": loss, "values": "  ".join(words)}
    return {"completed": update, "total": max(total, 1), **shown}


def totals(sweep: ViewedSweep, now: float) -> str:
    """How many jobs are done, failed, running and waiting, and how long it takes."""
    ended = [job for job in sweep.by_number.values() if not job.running]
    done = sum(job.finished for job in ended)
    counts = [f"{done} done"] if sweep.jobs is None else [f"{done} of {sweep.jobs} done"]
    counts += [f"{len(ended) - done} failed", f"{len(sweep.running())} running"]
    if sweep.jobs is not None:
        counts.append(f"{max(0, sweep.jobs - len(sweep.by_number))} waiting")
    text = f"{', '.join(counts)}; {duration(now - sweep.began)} elapsed"
    left = sweep.seconds_left(now)
    return text if left is None else f"{text}, about {duration(left)} left"


class LiveView:
    """Shows a sweep until `stop` from a thread, and prints a line for every job that ends."""

    def __init__(self, sweep: ViewedSweep, on: Console) -> None:
        self.sweep = sweep
        self.console = on
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._show, name="sweep-view", daemon=True)
        os.environ[VIEWED] = "1"
        self._thread.start()

    @classmethod
    def on_terminal(
        cls, folder: Path, launch: int, jobs: int | None, varied: Sequence[str], monitor: str, mode: str
    ) -> LiveView | None:
        """The view of a sweep that is about to begin, None where there is no terminal to show it on."""
        if not console.is_terminal:
            return None
        return cls(ViewedSweep(folder, launch, jobs, varied, monitor, mode, time.time()), console)

    def stop(self) -> None:
        """Removes the view, after the lines of the jobs that have ended since the last read."""
        self._stopped.set()
        self._thread.join()
        os.environ.pop(VIEWED, None)

    def _show(self) -> None:
        live = Live(console=self.console, auto_refresh=False, transient=True)
        try:
            while not self._stopped.wait(EVERY):
                self._print_ended()
                if self.sweep.by_number:
                    live.start()
                    live.update(render(self.sweep, time.time(), self.console.height), refresh=True)
        finally:
            live.stop()
        self._print_ended()

    def _print_ended(self) -> None:
        for job in self.sweep.read():
            self.console.print(
                job.result_line(self.sweep.monitor), highlight=False, soft_wrap=True, markup=False
            )
