"""A sweep: one parent run, a child run for each job, and a table when all are done."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from .errors import TrainingError
from .journal import SUMMARY, write_whole
from .live import View
from .places import begin_launch, begun, command_line, counted, launches, parallel

if TYPE_CHECKING:
    from .config import Config, TrackingConfig
    from .tracking import Store

PARENT = "sweep.json"


class SweepFolder(Callback):
    """Tells where Hydra puts the sweep that this process launches.

    Args:
        launch: 0 for the sweep's first launch, its number for one that goes on with it.
    """

    current: Path | None = None
    here = 0  # the launch that this process has begun
    asked: Sequence[str] = ()  # its command line, as typed
    jobs: int | None = None  # how many it has, where Hydra's own sweeper counts them
    view: View | None = None

    def __init__(self, launch: int = 0) -> None:
        self.launch = launch

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir).absolute()
        SweepFolder.current, SweepFolder.here = folder, self.launch
        if self.launch:
            begin_launch(folder, self.launch, command_line(SweepFolder.asked))
        SweepFolder.jobs, varied = counted(config)
        if parallel(config.hydra.launcher) and config.trainer.progress is not False:
            told = (SweepFolder.jobs, varied, config.monitor, config.mode)
            SweepFolder.view = View.on_terminal(folder, self.launch, *told)


@dataclass(frozen=True)
class SweepJob:
    """One job's place in its sweep.

    Attributes:
        number, name: of its folder.
        folder: the sweep's.
        jobs_at_once: jobs that share this machine's cores.
        parallel: whether others may run at the same time, here or elsewhere.
        launch: of the sweep, 0 for the first.
        turn, jobs: the launch's job `turn` of `jobs`, as far as this process knows.
    """

    number: int
    name: str
    folder: Path
    overrides: list[str]
    jobs_at_once: int
    parallel: bool = False
    launch: int = 0
    turn: int = 1
    jobs: int | None = None

    @classmethod
    def of(cls, hydra: Any) -> SweepJob | None:
        """The job that Hydra's configuration describes, None outside a sweep."""
        from hydra.types import RunMode

        if hydra.mode != RunMode.MULTIRUN:
            return None
        number, _, name = Path(hydra.runtime.output_dir).name.partition("_")
        folder = Path(hydra.sweep.dir).absolute()
        return cls(
            *(int(number), name, folder, list(hydra.overrides.task), _jobs_at_once(hydra.launcher)),
            parallel=parallel(hydra.launcher),
            launch=int(hydra.callbacks.sweep.launch),
            turn=int(hydra.job.num) + 1,
            jobs=SweepFolder.jobs if SweepFolder.current == folder else None,
        )

    @property
    def title(self) -> str:
        return f"job {self.number} {self.name}"

    def share_cores(self, config: Config) -> None:
        """Gives a parallel job its share of the cores, and keeps its live bar off the common terminal."""
        if self.jobs_at_once == 1:
            return
        if config.trainer.threads is None:
            at_once = self.jobs_at_once * (config.accum.processes or 1)
            config.trainer.threads = max(1, (os.cpu_count() or 1) // at_once)
        if "progress" in config.callbacks:
            config.callbacks["progress"]["show"] = False
        import multiprocessing

        # joblib's workers start processes by a method that torch's DataLoader cannot use.
        if multiprocessing.get_start_method(allow_none=True) == "loky":
            multiprocessing.set_start_method("spawn", force=True)

    def parent(self, store: Store | None) -> str | None:
        """The parent run's id; the first job that gets so far makes it, so a bad command line makes none."""
        if store is None:
            return None
        known = self.folder / PARENT
        with FileLock(self.folder / ".sweep.lock", timeout=120):
            if not known.exists():
                tags = {
                    "accumexp.command": command_line(sys.argv[1:]),
                    "accumexp.folder": str(self.folder),
                    "accumexp.sweep": "true",
                }
                run_id = store.create_run(f"sweep {self.folder.name}", tags)
                store.arrange_sweep(run_id)
                written = {"run_id": run_id, "experiment_id": store.experiment_id, "uri": store.uri}
                write_whole(known, {**written, "launch": self.launch})
            written = json.loads(known.read_text())
            if written.get("launch", 0) < self.launch:
                store.open_again(written["run_id"], launches(self.folder)[str(self.launch)])
                write_whole(known, {**written, "launch": self.launch})
            return written["run_id"]

    def same_store(self, tracking: TrackingConfig) -> None:
        """Keeps a sweep in the store it began in, whatever folder it goes on from."""
        known = self.folder / PARENT
        if tracking.uri is None and known.exists():
            tracking.uri = json.loads(known.read_text())["uri"]

    def failed(self, folder: Path, error: Exception) -> None:
        """Notes the job's failure where the sweep's end will find it."""
        summary = folder / SUMMARY
        known: dict[str, Any] = {"overrides": self.overrides}
        if summary.exists():
            known = json.loads(summary.read_text())
        known.update(status="FAILED", error=str(error) or type(error).__name__, launch=self.launch)
        write_whole(summary, known)


def _jobs_at_once(launcher: Any) -> int:
    if "joblib" not in str(launcher.get("_target_", "")):
        return 1
    jobs = int(launcher.get("n_jobs", 1) or 1)
    cores = os.cpu_count() or 1
    return jobs if jobs > 0 else max(1, cores + 1 + jobs)


@contextmanager
def closing_sweep(asked: Sequence[str] = ()) -> Iterator[None]:
    """Closes the sweep that is launched inside, however it ends: status of the parent, table, failed jobs.

    Args:
        asked: the command's arguments, as typed.

    Raises:
        TrainingError: naming the jobs that failed, after the rest have run, and how to go on with them.
    """
    SweepFolder.current, SweepFolder.asked = None, asked
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        if SweepFolder.current is None:
            raise
        sys.exit(130)  # without another line behind the one that says how to go on
    except SystemExit as stop:
        status = "KILLED" if stop.code in (130, 143) else status
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if SweepFolder.view is not None:
            SweepFolder.view.stop()
            SweepFolder.view = None
        if SweepFolder.current is not None and begun(SweepFolder.current, SweepFolder.here):
            _close_and_tell(SweepFolder.current, status)


def _close_and_tell(folder: Path, status: str) -> None:
    """Closes a sweep; if more of it is to be done, the last line says how."""
    how = f"go on with\n  python -m accumexp.run -m sweep.resume={shlex.quote(str(folder))}"
    try:
        _close(folder, status)
    except TrainingError as error:
        raise TrainingError(f"{error}\n{how}") from None
    if status != "FINISHED" and folder.exists():
        print(how, flush=True)


def _close(folder: Path, status: str) -> None:
    jobs = summaries(folder)
    if not jobs:
        if folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {"multirun.yaml"}:
            shutil.rmtree(folder)
        return
    unfinished = [job for job in jobs if job["status"] == "RUNNING"]
    failed = [job for job in jobs if job["status"] == "FAILED"]
    if status == "FINISHED" and (failed or unfinished):
        status = "FAILED"
    _show_table(jobs)
    if (folder / PARENT).exists():
        _close_parent(folder, status, unfinished)
    if status != "KILLED" and (failed or unfinished):
        lines = [f"{len(failed + unfinished)} of {len(jobs)} jobs failed"]
        for job in failed + unfinished:
            lines.append(f"  job {' '.join(job['overrides'])}: {job.get('error') or 'died'}")
        raise TrainingError("\n".join(lines))


def _close_parent(folder: Path, status: str, unfinished: list[dict[str, Any]]) -> None:
    from .config import TrackingConfig
    from .display import console
    from .tracking import Store

    parent = json.loads((folder / PARENT).read_text())
    store = Store(TrackingConfig(uri=parent["uri"]), parent["experiment_id"])
    for job in unfinished:
        if job.get("run_id"):
            store.client.set_terminated(job["run_id"], "KILLED")
    store.client.set_terminated(parent["run_id"], status)
    lines = [f"sweep   {folder}", f"UI      {store.sweep_address(parent['run_id'])}"]
    lines.append(f"charts  {store.charts_address(parent['run_id'])}")
    if store.ui_command:
        lines.append(f"serve   {store.ui_command}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def summaries(folder: Path) -> list[dict[str, Any]]:
    """What every job of a sweep wrote of itself, in the order of the jobs."""
    paths = sorted(folder.glob(f"*_*/{SUMMARY}"), key=lambda path: int(path.parent.name.partition("_")[0]))
    return [{**json.loads(path.read_text()), "folder": str(path.parent)} for path in paths]


def groups(jobs: Sequence[dict[str, Any]]) -> tuple[list[str], dict[tuple[str, ...], list[dict[str, Any]]]]:
    """(the keys that vary over the jobs, but the seed; the finished jobs by these keys' values)."""
    values = [dict(o.lstrip("+").split("=", 1) for o in job["overrides"] if "=" in o) for job in jobs]
    every = {key: None for value in values for key in value}
    varied = [key for key in every if key != "seed" and len({value.get(key) for value in values}) > 1]
    keys = varied or ["accum.steps"]
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for job, value in zip(jobs, values, strict=True):
        if job["status"] == "FINISHED":
            found.setdefault(tuple(value.get(key, "default") for key in keys), []).append(job)
    return keys, found


def _show_table(jobs: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over seeds for every combination of what varied."""
    from rich import box
    from rich.table import Table

    from .display import console

    keys, found = groups(jobs)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for key in keys:
        table.add_column(key)
    for heading in ("seeds", "test accuracy", "test loss", "updates", "time", "ms/update", "activations"):
        table.add_column(heading, justify="right", no_wrap=True)
    for values, members in found.items():
        finals = [job["final"] for job in members]
        table.add_row(
            *values,
            str(len(members)),
            _spread([final["accuracy"] for final in finals if "accuracy" in final]),
            f"{statistics.fmean(final['loss'] for final in finals):.4f}",
            f"{statistics.fmean(final['updates'] for final in finals):.0f}",
            f"{statistics.fmean(final['seconds'] for final in finals):.1f} s",
            f"{statistics.median(final['update_ms'] for final in finals):.2f}",
            f"{statistics.fmean(final['activation_mib'] for final in finals):.2f} MiB",
        )
    console.print(table)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = statistics.fmean(values)
    return f"{mean:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
