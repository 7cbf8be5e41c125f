"""A sweep: one parent run, a child run for each job, and a table when all are done."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from .errors import TrainingError

if TYPE_CHECKING:
    from .config import Config
    from .tracking import Store

log = logging.getLogger(__name__)
PARENT = "sweep.json"
SUMMARY = "summary.json"


class SweepFolder(Callback):
    """Tells where Hydra puts the sweep that this process launches."""

    current: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        SweepFolder.current = Path(config.hydra.sweep.dir).absolute()


@dataclass(frozen=True)
class SweepJob:
    """One job's place in its sweep."""

    number: int
    name: str
    folder: Path
    overrides: list[str]
    jobs_at_once: int

    @classmethod
    def of(cls, hydra: Any) -> SweepJob | None:
        """The job that Hydra's configuration describes, None outside a sweep."""
        from hydra.types import RunMode

        if hydra.mode != RunMode.MULTIRUN:
            return None
        number, _, name = str(hydra.sweep.subdir).partition("_")
        folder = Path(hydra.sweep.dir).absolute()
        return cls(int(number), name, folder, list(hydra.overrides.task), _jobs_at_once(hydra.launcher))

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
                    "accumexp.command": shlex.join(["python", "-m", "accumexp.run", *sys.argv[1:]]),
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


def _jobs_at_once(launcher: Any) -> int:
    if "joblib" not in str(launcher.get("_target_", "")):
        return 1
    jobs = int(launcher.get("n_jobs", 1) or 1)
    cores = os.cpu_count() or 1
    return jobs if jobs > 0 else max(1, cores + 1 + jobs)


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
    from .display import console

    jobs = summaries(folder)
    if not jobs:
        if folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {"multirun.yaml"}:
            shutil.rmtree(folder)
        return
    unfinished = [job for job in jobs if job["status"] == "RUNNING"]
    failed = [job for job in jobs if job["status"] == "FAILED"]
    if status == "FINISHED" and (failed or unfinished):
        status = "FAILED"
    addresses = _close_parent(folder, status, unfinished) if (folder / PARENT).exists() else []
    _report(folder, files=status != "KILLED")
    console.print("\n".join([f"sweep   {folder}", *addresses]), highlight=False, soft_wrap=True, markup=False)
    if status != "KILLED" and (failed or unfinished):
        lines = [f"{len(failed + unfinished)} of {len(jobs)} jobs failed"]
        for job in failed + unfinished:
            lines.append(f"  job {' '.join(job['overrides'])}: {job.get('error') or 'died'}")
        raise TrainingError("\n".join(lines))


def _close_parent(folder: Path, status: str, unfinished: list[dict[str, Any]]) -> list[str]:
    """Ends the parent run, and those of jobs that died; the lines that say where to look at them."""
    from .config import TrackingConfig
    from .tracking import Store

    parent = json.loads((folder / PARENT).read_text())
    store = Store(TrackingConfig(uri=parent["uri"]), parent["experiment_id"])
    for job in unfinished:
        if job.get("run_id"):
            store.client.set_terminated(job["run_id"], "KILLED")
    store.client.set_terminated(parent["run_id"], status)
    lines = [f"UI      {store.sweep_address(parent['run_id'])}"]
    lines.append(f"charts  {store.charts_address(parent['run_id'])}")
    if store.ui_command:
        lines.append(f"serve   {store.ui_command}")
    return lines


def _report(folder: Path, files: bool) -> None:
    """The sweep's report; a report that fails leaves the sweep as it ended, and says how to make it again."""
    from .reporting import find, publish

    try:
        publish(find(str(folder)), {}, files=files)
    except Exception as error:
        log.info("no report", exc_info=error)
        again = f"python -m accumexp.report sweep={folder}"
        print(f"no report: {str(error) or type(error).__name__}; again with\n  {again}", file=sys.stderr)


def summaries(folder: Path) -> list[dict[str, Any]]:
    """What every job of a sweep wrote of itself, in the order of the jobs."""
    paths = sorted(folder.glob(f"*_*/{SUMMARY}"), key=lambda path: int(path.parent.name.partition("_")[0]))
    return [{**json.loads(path.read_text()), "folder": str(path.parent)} for path in paths]
