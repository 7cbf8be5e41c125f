"""Hydra's job of `run`: one run, in this process or in ranks of its own, and the handling of its errors."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..cli import exit_with_error, log_error
from ..config.environment_values import environment_values, recorded
from ..config.job_folder import keep_launch_paths
from ..config.loading import from_hydra, typed
from ..config.trust import inert
from ..environment.console import output_to_log, print_line
from ..environment.launch import launch
from ..environment.ranks import RankInfo, launched_rank, skip_group_teardown
from ..errors import UsageError, first_line, masked
from ..sweeps.job import SweepJob
from ..sweeps.job_status import JobStatus, agreed_status, job_status
from ..tracking.run_folder import RunFolder, RunStatus
from .resume_checks import ChangedJob, check_same_job
from .spec import RunSpec

log = logging.getLogger(__name__)


def run_job(cfg: DictConfig) -> float | None:
    """Trains, and returns the monitored value. An error ends the process, unless it is a job of a sweep."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    keep_launch_paths(cfg, hydra)
    job = SweepJob.of(hydra)
    folder = RunFolder(Path(hydra.runtime.output_dir))
    launched = launched_rank()
    rank_info = launched or RankInfo()
    with ExitStack() as stack:
        if job and rank_info.first:
            stack.enter_context(output_to_log(folder.path, job.parallel))
            stack.enter_context(folder.hold(job.title))
        try:
            if not job and rank_info.first:
                stack.enter_context(folder.hold_alone("resume" if cfg.resume else "hydra.run.dir"))
            return _run(cfg, hydra, job, folder, launched)
        except Exception as error:
            _fail(error, job, folder, rank_info, resumed=bool(cfg.resume))
    return None


def _run(
    cfg: DictConfig, hydra: Any, job: SweepJob | None, folder: RunFolder, launched: RankInfo | None
) -> float | None:
    rank_info = launched or RankInfo()
    status = job_status(folder) if job and rank_info.first else JobStatus()
    if job and (status.finished or status.checkpoint) and rank_info.first:
        check_same_job(folder, recorded(from_hydra(cfg), environment_values(cfg)))
    if status.finished and rank_info.size == 1:
        return _finished_before(job, status)
    if not job and not cfg.resume and rank_info.first:
        folder.check_unused("hydra.run.dir")
    spec = RunSpec.of(cfg, hydra, job)
    if job and rank_info.size > 1:
        status = agreed_status(status, rank_info, spec.config.device)
        if status.finished:
            return _finished_before(job if rank_info.first else None, status)
    if status.checkpoint:
        spec = spec.resumed_at(status.checkpoint)
    elif job and rank_info.first:
        folder.clear()
    processes = spec.config.accum.processes or 1
    if launched is None and processes > 1:
        logging_config: Any = OmegaConf.to_container(hydra.job_logging, resolve=True)
        return run_in_ranks(spec, processes, logging_config)
    return carry_out(spec, rank_info)


def _finished_before(job: SweepJob | None, status: JobStatus) -> float | None:
    if job:
        print(f"{job.title}: finished before", flush=True)
    return status.monitored


def _fail(
    error: Exception, job: SweepJob | None, folder: RunFolder, rank_info: RankInfo, resumed: bool
) -> None:
    """Shows and records the error, and ends the process unless a sweep's next job has to run in it."""
    refused = isinstance(error, UsageError)
    if job and job.alone and refused and not folder.summary_file.exists():
        job = None  # `replicas=` without a sweep, and nothing has been written
    log_error(error)
    if rank_info.first and refused and not job and not resumed:
        folder.remove_unused()
    if isinstance(error, ChangedJob):
        exit_with_error(error, rank_info)
    if job and rank_info.first:
        print_line(f"{job.title}: failed: {masked(first_line(error))}", style="red", markup=False)
        job.record_failure(folder, error)
    if job and (rank_info.size == 1 or "SUBMITIT_EXECUTOR" in os.environ):
        skip_group_teardown()
        return
    # The first rank of a sweep still closes the sweep.
    exit_with_error(error, rank_info, end_rank=not (job and rank_info.first))


def carry_out(spec: RunSpec, rank_info: RankInfo) -> float | None:
    """Trains in this process and returns the monitored value at the end."""
    if spec.replicas:
        from .replica_run import ReplicaRun

        return ReplicaRun(spec).execute()
    from .session import Run

    return Run(spec, rank_info).execute()


def carry_out_in_rank(spec: RunSpec) -> None:
    """Trains in a rank that `launch` started; the first rank holds the folder's second lock."""
    rank_info = launched_rank()
    assert rank_info is not None
    with spec.folder.hold_for_ranks() if rank_info.first else nullcontext():
        carry_out(spec, rank_info)


def run_in_ranks(spec: RunSpec, processes: int, logging_config: dict[str, Any]) -> float | None:
    """Trains in new ranks and returns the monitored value; closes the run's record if the ranks die."""
    try:
        launch(carry_out_in_rank, spec, processes, logging_config)
    except Exception as error:
        _close_dead_run(spec.folder, RunStatus.FAILED, first_line(error))
        raise
    except (KeyboardInterrupt, SystemExit):
        _close_dead_run(spec.folder, RunStatus.KILLED, None)
        raise
    summary = spec.folder.summary()
    return summary.monitored if summary else None


def _close_dead_run(folder: RunFolder, status: RunStatus, error: str | None) -> None:
    """Closes the record of a run whose ranks died, and corrects its error."""
    summary = folder.summary()
    if summary is None:
        return
    unclosed = summary.status is RunStatus.RUNNING
    if unclosed or error and summary.status is RunStatus.FAILED:
        summary.status, summary.error = status, error
        folder.write_summary(summary)
    written = folder.read_config()
    if unclosed and summary.run_id and written is not None:
        from ..tracking import Store

        tracking = typed(inert(OmegaConf.to_container(written, resolve=False))).tracking
        try:
            Store(tracking).client.set_terminated(summary.run_id, status)
        except Exception as unreachable:
            log.warning("tracking: %s did not reach the run's store: %s", status, first_line(unreachable))
