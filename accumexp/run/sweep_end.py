"""The end of a sweep: status of the parent, report, and which jobs failed."""

from __future__ import annotations

import json
import logging
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..environment.console import console
from ..errors import TrainingError
from ..sweeps.job_folders import LAUNCHES, LOCK, PLACES, begun, places
from ..sweeps.job_status import held
from ..sweeps.sweep import PARENT, SweepFolder, summaries
from ..tracking.journal import SUMMARY, read_whole

log = logging.getLogger(__name__)
NOTHING = {"multirun.yaml", LAUNCHES, LOCK, PLACES}  # what a sweep's folder holds before its first job


@contextmanager
def closing_sweep(asked: Sequence[str] = (), changes: Mapping[str, str] | None = None) -> Iterator[None]:
    """Closes the sweep that is launched inside, however it ends: status of the parent, report, failed jobs.

    Args:
        asked: the command's arguments, as typed.
        changes: `report.*` settings instead of those that the sweep was run with.

    Raises:
        TrainingError: naming the jobs that failed, after the rest have run, and how to go on with them.
    """
    SweepFolder.current, SweepFolder.own_launches, SweepFolder.asked = None, (), asked
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
        SweepFolder.stop_view()
        folder, rank_info = SweepFolder.current, SweepFolder.own_launches
        if folder is not None and any(begun(folder, launch) for launch in rank_info):
            _close_and_tell(folder, status, rank_info, changes or {})


def _close_and_tell(folder: Path, status: str, rank_info: Sequence[int], changes: Mapping[str, str]) -> None:
    """Closes a sweep; if more of it is to be done, the last line says how."""
    how = f"go on with\n  python -m accumexp.run -m sweep.resume={shlex.quote(str(folder))}"
    try:
        _close(folder, status, rank_info, changes)
    except TrainingError as error:
        raise TrainingError(f"{error}\n{how}") from None
    if status != "FINISHED" and folder.exists():
        print(how, flush=True)


def _close(folder: Path, status: str, rank_info: Sequence[int], changes: Mapping[str, str]) -> None:
    jobs = summaries(folder)
    if not jobs:
        if folder.is_dir() and {entry.name for entry in folder.iterdir()} <= NOTHING:
            shutil.rmtree(folder)
        return
    elsewhere = _still_running(folder, rank_info)
    over = [job for job in jobs if job["place"] not in elsewhere]
    unfinished = [job for job in over if job["status"] == "RUNNING"]
    failed = [job for job in over if job["status"] == "FAILED"]
    if status == "FINISHED" and (failed or unfinished):
        status = "FAILED"
    addresses, recorded = [], (folder / PARENT).exists()
    try:
        if recorded:
            addresses = _close_parent(folder, None if elsewhere else status, unfinished)
    except Exception as error:
        log.info("the end is not recorded", exc_info=error)
        reason = (str(error) or type(error).__name__).splitlines()[0]
        uri = read_whole(folder / PARENT).get("uri", "its store")
        print(f"warning: the sweep's end did not reach {uri}: {reason}", file=sys.stderr)
        recorded = False
    _report(folder, changes, recorded, files=status != "KILLED")
    if elsewhere:
        print(f"jobs of another launch still run: {', '.join(elsewhere)}", flush=True)
    console.print("\n".join([f"sweep   {folder}", *addresses]), highlight=False, soft_wrap=True, markup=False)
    if status != "KILLED" and (failed or unfinished):
        lines = [f"{len(failed + unfinished)} of {len(jobs)} jobs failed"]
        for job in failed + unfinished:
            lines.append(f"  job {' '.join(job['overrides'])}: {job.get('error') or 'died'}")
        raise TrainingError("\n".join(lines))


def _still_running(folder: Path, rank_info: Sequence[int]) -> list[str]:
    """The folders in which jobs of other launches than those of this process still run."""
    found = []
    for name, launch in {one.folder: one.launch for one in places(folder)}.items():
        known = read_whole(folder / name / SUMMARY)
        if known.get("status") != "FINISHED" and known.get("launch", launch) not in rank_info:
            found += [name] * held(folder / name)
    return found


def _close_parent(folder: Path, status: str | None, unfinished: list[dict[str, Any]]) -> list[str]:
    """Ends the parent run, and those of jobs that died; the lines that say where to look at them.

    Args:
        status: None if another launch still has to end it.
    """
    from ..config.schema import TrackingConfig
    from ..tracking import Store

    parent = json.loads((folder / PARENT).read_text())
    store = Store(TrackingConfig(uri=parent["uri"]), parent["experiment_id"])
    for job in unfinished:
        if job.get("run_id"):
            store.client.set_terminated(job["run_id"], "KILLED")
    if status is not None:
        store.client.set_terminated(parent["run_id"], status)
    return store.sweep_lines(parent["run_id"])


def _report(folder: Path, changes: Mapping[str, str], recorded: bool, files: bool) -> None:
    """The sweep's report; a report that fails leaves the sweep as it ended, and says how to make it again.

    Args:
        recorded: whether it is made from the store, which can be used, or from the folder alone.
    """
    from ..config.report import report_from
    from ..report.find import find_sweep
    from ..report.jobs import from_folder
    from ..report.publish import publish

    try:
        sweep = find_sweep(str(folder)) if recorded else from_folder(folder)
        publish(sweep, changes, files=files and report_from({}, changes).write)
    except Exception as error:
        log.info("no report", exc_info=error)
        again = f"python -m accumexp.report sweep={folder}"
        print(f"no report: {str(error) or type(error).__name__}; again with\n  {again}", file=sys.stderr)
