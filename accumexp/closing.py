"""The end of a sweep: status of the parent, report, and which jobs failed."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import TrainingError
from .places import begun
from .sweep import PARENT, SweepFolder, summaries
from .terminal import console

log = logging.getLogger(__name__)


@contextmanager
def closing_sweep(asked: Sequence[str] = ()) -> Iterator[None]:
    """Closes the sweep that is launched inside, however it ends: status of the parent, report, failed jobs.

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
