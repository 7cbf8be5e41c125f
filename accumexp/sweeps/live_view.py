"""A live view of a parallel sweep in the process that launched it: which jobs run, how far, the best so far.

It is read from what the jobs write into their folders, so it is the same for every launcher. Jobs that are
viewed write to `output.log` in their folder instead of the terminal.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..environment.console import VIEWED, console, duration, result
from ..tracking.journal import PROGRESS, SUMMARY, read_whole
from .job_folders import PLACES, JobFolder, number_of, places

EVERY = 0.5  # seconds between two looks at the folder
SILENT = 30.0  # seconds without a point after which the view says so; an evaluation may take as long
OTHER_LINES = 4  # of the view: the jobs that do not fit, the totals, the best, and the cursor's own


@dataclass
class Seen:
    """What a job of this launch has told in its folder.

    Attributes:
        before: it had finished before this launch.
        progress: the content of its `progress.json`.
        summary: the content of its `summary.json`, once it has ended.
    """

    place: JobFolder
    status: str = "RUNNING"
    before: bool = False
    progress: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> int:
        return number_of(self.place.folder)

    @property
    def title(self) -> str:
        return f"job {self.place.folder.replace('_', ' ', 1)}"

    @property
    def share(self) -> float:
        """How much of its updates are done, from 0 to 1."""
        if self.status != "RUNNING":
            return 1.0
        total = self.progress.get("total_updates")
        return self.progress["update"] / total if total else 0.0

    def ended(self) -> str:
        """The line that tells how it ended."""
        if self.before:
            return f"{self.title}: finished before"
        if self.status == "FINISHED":
            return f"{self.title}: {result(self.summary['final'])}"
        reason = self.summary.get("error") or self.status.lower()
        return f"{self.title}: {reason.splitlines()[0]}, see {self.place.folder}/run.log"


@dataclass
class Watched:
    """A sweep's folder as it was last read.

    Args:
        launch: whose jobs count.
        jobs: how many there are, or None if that is decided on the way.
        varied: the keys that tell one job from another; all if none are known.
        monitor, mode: the value of which the best is shown, and whether that is the "max" or the "min".
        began: when the launch began, in seconds since 1970.
    """

    folder: Path
    launch: int
    jobs: int | None
    varied: Sequence[str]
    monitor: str
    mode: str
    began: float
    seen: dict[int, Seen] = field(default_factory=dict)
    _noted: int = 0  # bytes of the list of places that are read

    def read(self) -> list[Seen]:
        """Looks at the jobs that had not ended at the last look; gives those that have ended since."""
        noted = self.folder / PLACES
        size = noted.stat().st_size if noted.exists() else 0
        if size != self._noted:
            self._noted = size
            for place in places(self.folder):
                if place.launch == self.launch:
                    self.seen.setdefault(place.number, Seen(place))
        ended = []
        for job in self.seen.values():
            if job.status == "RUNNING":
                self._look(job)
                if job.status != "RUNNING":
                    ended.append(job)
        return ended

    def _look(self, job: Seen) -> None:
        folder = self.folder / job.place.folder
        summary = read_whole(folder / SUMMARY)
        status = summary.get("status", "RUNNING")
        # Of a job that is about to be done again, an earlier launch tells an end that is none.
        if summary.get("launch", 0) == self.launch or status == "FINISHED":
            job.status, job.before = status, summary.get("launch", 0) != self.launch
            job.summary = summary
        if job.status == "RUNNING":
            told = read_whole(folder / PROGRESS)
            if told.get("time", 0.0) >= job.place.time:
                job.progress = told

    def running(self) -> list[Seen]:
        return [job for job in self.seen.values() if job.status == "RUNNING"]

    def best(self) -> tuple[float, Seen] | None:
        """The best monitored value: of jobs at their end, and of running ones at their newest evaluation."""
        found = []
        for job in self.seen.values():
            ended = job.status == "FINISHED"
            newest = job.progress.get("values", {}).get(self.monitor)
            value = job.summary.get("monitored") if ended else newest
            if value is not None and not math.isnan(value):
                found.append((value, job))
        if not found:
            return None
        return (max if self.mode == "max" else min)(found, key=lambda one: one[0])

    def seconds_left(self, now: float) -> float | None:
        """At the pace so far, in jobs an elapsed second; None before there is one."""
        new = [job for job in self.seen.values() if not job.before]
        done = sum(job.share for job in new)
        if self.jobs is None or not done:
            return None
        ahead = self.jobs - sum(job.share for job in self.seen.values())
        return max(0.0, (now - self.began) * ahead / done)

    def name(self, job: Seen) -> str:
        """The overrides that tell a job from the others."""
        every = job.place.overrides
        varied = [one for one in every if one.partition("=")[0].lstrip("+") in self.varied]
        return " ".join(varied or every)


def render(watched: Watched, now: float, height: int) -> RenderableType:
    """The view at time `now` (seconds since 1970), in at most `height` lines."""
    running = sorted(watched.running(), key=lambda job: job.number)
    room = max(1, height - OTHER_LINES)
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis", max_width=48)
    table.add_column(width=20)
    for _ in range(2):
        table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for job in running[:room]:
        table.add_row(*_row(watched, job, now))
    lines: list[RenderableType] = [table] if running else []
    if len(running) > room:
        lines.append(Text(f"and {len(running) - room} more are running", style="dim"))
    lines.append(Text(totals(watched, now), no_wrap=True, overflow="ellipsis"))
    best = watched.best()
    if best:
        value, job = best
        running_still = " so far" if job.status == "RUNNING" else ""
        text = f"best {watched.monitor} {value:.4f}{running_still}: job {job.number} {watched.name(job)}"
        lines.append(Text(text, style="bold", no_wrap=True, overflow="ellipsis"))
    return Group(*lines)


def totals(watched: Watched, now: float) -> str:
    """How many jobs are done, failed, running and waiting, and how long it takes."""
    ended = [job for job in watched.seen.values() if job.status != "RUNNING"]
    done = sum(job.status == "FINISHED" for job in ended)
    counts = [f"{done} done"] if watched.jobs is None else [f"{done} of {watched.jobs} done"]
    counts.append(f"{len(ended) - done} failed")
    counts.append(f"{len(watched.running())} running")
    if watched.jobs is not None:
        counts.append(f"{max(0, watched.jobs - len(watched.seen))} waiting")
    text = f"{', '.join(counts)}; {duration(now - watched.began)} elapsed"
    left = watched.seconds_left(now)
    return text if left is None else f"{text}, about {duration(left)} left"


def _row(watched: Watched, job: Seen, now: float) -> list[RenderableType]:
    progress = job.progress
    if not progress:
        return [str(job.number), Text(watched.name(job)), "", "", "", Text("starting", style="dim")]
    update, total = progress["update"], progress["total_updates"]
    values: Mapping[str, float] = progress["values"]
    words = []
    if watched.monitor in values:
        words.append(f"{watched.monitor} {values[watched.monitor]:.4f}")
    if "perf/update_ms" in values:
        words.append(f"{1e3 / max(values['perf/update_ms'], 1e-9):.1f} updates/s")
    if now - progress["time"] > SILENT:
        words.append(f"silent for {duration(now - progress['time'])}")
    loss = f"loss {values['train/loss']:.4f}" if "train/loss" in values else ""
    return [
        str(job.number),
        Text(watched.name(job)),
        ProgressBar(total=max(total, 1), completed=update, width=20),
        f"{update}/{total}",
        loss,
        Text("  ".join(words)),
    ]


class View:
    """Shows a sweep until `stop`, from a thread of its own, and prints a line for every job that ends."""

    def __init__(self, watched: Watched, on: Console) -> None:
        self.watched = watched
        self.console = on
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, name="sweep-view", daemon=True)
        os.environ[VIEWED] = "1"
        self._thread.start()

    @classmethod
    def on_terminal(
        cls, folder: Path, launch: int, jobs: int | None, varied: Sequence[str], monitor: str, mode: str
    ) -> View | None:
        """The view of a sweep that is about to begin, None where there is no terminal to show it on."""
        if not console.is_terminal:
            return None
        return cls(Watched(folder, launch, jobs, varied, monitor, mode, time.time()), console)

    def stop(self) -> None:
        """Takes the view away, after the lines of the jobs that have ended since the last look."""
        self._over.set()
        self._thread.join()
        os.environ.pop(VIEWED, None)

    def _show(self) -> None:
        live = Live(console=self.console, auto_refresh=False, transient=True)
        try:
            while not self._over.wait(EVERY):
                self._look()
                if self.watched.seen:
                    live.start()
                    live.update(render(self.watched, time.time(), self.console.height), refresh=True)
        finally:
            live.stop()
        self._look()

    def _look(self) -> None:
        for job in self.watched.read():
            self.console.print(job.ended(), highlight=False, soft_wrap=True, markup=False)
