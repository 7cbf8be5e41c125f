"""The end of a sweep: the parent run's status, the report, and which jobs failed."""

from __future__ import annotations

import logging
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..environment.console import console
from ..environment.signals import exit_code_of
from ..errors import TrainingError, UsageError, first_line
from ..sweeps.job_folders import JOBS, LAUNCHES, LOCK, has_jobs, job_folders
from ..sweeps.sweep import PARENT, SweepRun, launched_sweep, parent_of, sweep_runs
from ..tracking.json_file import read_json
from ..tracking.run_folder import LAUNCH_LOCK, UNSENT, RunFolder, RunStatus
from .sweep_trust import needed_trust

log = logging.getLogger(__name__)
BEFORE_JOBS = {"multirun.yaml", LAUNCHES, LOCK, JOBS}  # the files of a sweep that has started no job


@contextmanager
def closing_sweep(
    arguments: Sequence[str] = (), report_settings: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Closes the sweep that is launched in the body: its parent run, report and failed jobs.

    Args:
        report_settings: `report.*` settings that replace the sweep's.

    Raises:
        TrainingError: naming the failed jobs and how to resume the sweep.
    """
    launched_sweep.reset(arguments)
    try:
        with _closed(report_settings or {}):
            yield
    finally:
        launched_sweep.release()


@contextmanager
def _closed(report_settings: Mapping[str, str]) -> Iterator[None]:
    handler = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(exit_code_of(number)))
    status = RunStatus.FAILED
    try:
        yield
        status = RunStatus.FINISHED
    except KeyboardInterrupt:
        status = RunStatus.KILLED
        if launched_sweep.folder is None:
            raise
        sys.exit(130)  # the line that says how to resume is the last one
    except SystemExit as stop:
        status = RunStatus.KILLED if stop.code in (130, 143) else status
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
        launched_sweep.stop_view()
        folder, launches = launched_sweep.folder, launched_sweep.launches
        if folder is not None and any(has_jobs(folder, launch) for launch in launches):
            _close_with_advice(folder, status, launches, report_settings)


def _close_with_advice(
    folder: Path, status: RunStatus, launches: Sequence[int], report_settings: Mapping[str, str]
) -> None:
    """Closes a sweep and prints how to resume it if jobs are missing."""
    advice = f"go on with\n  python -m accumexp.run -m sweep.resume={shlex.quote(str(folder))}"
    with suppress(UsageError):
        advice += needed_trust(folder)
    try:
        _close(folder, status, launches, report_settings)
    except TrainingError as error:
        raise TrainingError(f"{error}\n{advice}") from None
    if status is not RunStatus.FINISHED and folder.exists():
        print(advice, flush=True)


def _close(
    folder: Path, status: RunStatus, launches: Sequence[int], report_settings: Mapping[str, str]
) -> None:
    runs = sweep_runs(folder)
    if not runs:
        if folder.is_dir() and all(_before_jobs(entry.name) for entry in folder.iterdir()):
            shutil.rmtree(folder)
        return
    elsewhere = _running_elsewhere(folder, launches)
    ended = [run for run in runs if run.job_folder not in elsewhere]
    died = [run for run in ended if run.status is RunStatus.RUNNING]
    failed = [run for run in ended if run.status is RunStatus.FAILED]
    if status is RunStatus.FINISHED and (failed or died):
        status = RunStatus.FAILED
    addresses, recorded = [], (folder / PARENT).exists()
    try:
        if recorded:
            addresses = _close_parent(folder, None if elsewhere else status, died)
    except Exception as error:
        log.info("the end is not recorded", exc_info=error)
        uri = read_json(folder / PARENT).get("uri", "its store")
        print(f"warning: the sweep's end did not reach {uri}: {first_line(error)}", file=sys.stderr)
        recorded = False
    killed = status is RunStatus.KILLED
    _report(folder, report_settings, recorded, files=not killed)
    if any(folder.rglob(UNSENT)):
        print(
            f"not all of it is in the store; send it with\n  python -m accumexp.report sync={folder}",
            flush=True,
        )
    if elsewhere:
        print(f"jobs of another launch still run: {', '.join(elsewhere)}", flush=True)
    console.print("\n".join([f"sweep   {folder}", *addresses]), highlight=False, soft_wrap=True, markup=False)
    if not killed and (failed or died):
        lines = [f"{len(failed + died)} of {len(runs)} jobs failed"]
        lines += [f"  job {' '.join(run.overrides)}: {run.error or 'died'}" for run in failed + died]
        raise TrainingError("\n".join(lines))


def _before_jobs(name: str) -> bool:
    return name in BEFORE_JOBS or name.startswith(LAUNCH_LOCK)


def _running_elsewhere(folder: Path, launches: Sequence[int]) -> list[str]:
    """The folders in which jobs of other processes' launches still run."""
    running = []
    for name, newest_launch in {job.folder: job.launch for job in job_folders(folder)}.items():
        job = RunFolder(folder / name)
        summary = job.summary()
        launch = summary.launch if summary else newest_launch
        if not (summary and summary.finished) and launch not in launches and job.held():
            running.append(name)
    return running


def _close_parent(folder: Path, status: RunStatus | None, died: Sequence[SweepRun]) -> list[str]:
    """Ends the parent run, unless `status` is None, and the runs that died; returns the sweep's addresses."""
    from ..config.schema import TrackingConfig
    from ..tracking import Store

    parent = parent_of(folder)
    store = Store(TrackingConfig(uri=parent["uri"]), parent["experiment_id"])
    for run in died:
        if run.run_id:
            store.client.set_terminated(run.run_id, RunStatus.KILLED)
    if status is not None:
        store.client.set_terminated(parent["run_id"], status)
    return store.sweep_lines(parent["run_id"])


def _report(folder: Path, settings: Mapping[str, str], recorded: bool, files: bool) -> None:
    """Makes the report, from the store if the sweep is `recorded`; a failure is one line with the remedy."""
    try:
        from ..config.overrides import report_from
        from ..report.jobs import find_sweep, from_folder
        from ..report.publish import publish

        sweep = find_sweep(str(folder)) if recorded else from_folder(folder)
        publish(sweep, settings, files=files and report_from({}, settings).write)
    except Exception as error:
        log.info("no report", exc_info=error)
        again = f"python -m accumexp.report sweep={folder}"
        print(f"no report: {str(error) or type(error).__name__}; again with\n  {again}", file=sys.stderr)
