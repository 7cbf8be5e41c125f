"""A sweep: one parent run, a child run for each job, and a table when all are done."""

from __future__ import annotations

import json
import math
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
from omegaconf import DictConfig, OmegaConf

from .errors import TrainingError

if TYPE_CHECKING:
    from .tracking import Store

PARENT = "sweep.json"
SUMMARY = "summary.json"


class SweepFolder(Callback):
    """Tells where Hydra puts the sweep that this process launches."""

    current: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        SweepFolder.current = Path(config.hydra.sweep.dir).absolute()


def command_line(arguments: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "accumexp.run", *arguments])


def _batch(sweeper: Any, overrides: Sequence[str]) -> int | None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not str(sweeper.get("_target_", "")).endswith(".BasicSweeper"):
        return None
    given = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    counts: dict[str, int] = {}
    try:
        # The last word for a key is the one that counts.
        for override in OverridesParser.create().parse_overrides([*given, *overrides]):
            sweeps = override.is_sweep_override()
            values = list(override.sweep_string_iterator()) if sweeps else [None]
            counts[override.get_key_element()] = len(values)
    except HydraException:  # a glob, which needs all of the configuration
        return None
    jobs = math.prod(counts.values())
    return min(jobs, sweeper.get("max_batch_size") or jobs)


@dataclass(frozen=True)
class SweepJob:
    """One job's place in its sweep.

    Attributes:
        command: the command line that asked for the sweep; a launcher's worker has one of its own.
        batch: the jobs that are handed to the launcher together, None if the sweeper is not Hydra's own.
    """

    number: int
    name: str
    folder: Path
    overrides: list[str]
    command: str
    batch: int | None

    @classmethod
    def of(cls, hydra: Any) -> SweepJob | None:
        """The job that Hydra's configuration describes, None outside a sweep."""
        from hydra.types import RunMode

        if hydra.mode != RunMode.MULTIRUN:
            return None
        number, _, name = str(hydra.sweep.subdir).partition("_")
        folder = Path(hydra.sweep.dir).absolute()
        written = folder / "multirun.yaml"  # by Hydra's sweeper, before the first job
        asked = OmegaConf.load(written).hydra.overrides if written.exists() else hydra.overrides
        arguments = sys.argv[1:]
        if SweepFolder.current is None:
            own = [override for override in asked.hydra if override != "hydra.mode=MULTIRUN"]
            arguments = ["-m", *asked.task, *own]
        batch = _batch(hydra.sweeper, asked.task)
        return cls(int(number), name, folder, list(hydra.overrides.task), command_line(arguments), batch)

    def parent(self, store: Store | None) -> str | None:
        """The parent run's id; the first job that gets so far makes it, so a bad command line makes none."""
        if store is None:
            return None
        known = self.folder / PARENT
        with FileLock(self.folder / ".sweep.lock", timeout=120):
            if not known.exists():
                tags = {
                    "accumexp.command": self.command,
                    "accumexp.folder": str(self.folder),
                    "accumexp.sweep": "true",
                }
                run_id = store.create_run(f"sweep {self.folder.name}", tags)
                store.arrange_sweep(run_id)
                written = {"run_id": run_id, "experiment_id": store.experiment_id, "uri": store.uri}
                known.write_text(json.dumps(written) + "\n")
            return json.loads(known.read_text())["run_id"]

    def failed(self, folder: Path, error: Exception) -> None:
        """Notes the job's failure where the sweep's end will find it."""
        summary = folder / SUMMARY
        known: dict[str, Any] = {"overrides": self.overrides}
        if summary.exists():
            known = json.loads(summary.read_text())
        known.update(status="FAILED", error=str(error) or type(error).__name__)
        summary.write_text(json.dumps(known, indent=2) + "\n")


@contextmanager
def closing_sweep() -> Iterator[None]:
    """Closes the sweep that is launched inside, however it ends: status of the parent, table, failed jobs.

    Raises:
        TrainingError: naming the jobs that failed, after the rest have run.
    """
    SweepFolder.current = None
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit) as stop:
        status = "KILLED" if isinstance(stop, KeyboardInterrupt) or stop.code in (130, 143) else status
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        if SweepFolder.current is not None:
            _close(SweepFolder.current, status)


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
