"""Hydra's job: one run, in this process or in ranks of its own, and what becomes of its errors."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..cli import WANTS_TRACEBACK
from ..environment.console import unseen
from ..environment.ranks import RankInfo, exit_immediately, launched_rank, skip_group_teardown
from ..errors import TrainingError, UsageError, print_error
from ..sweeps.job_status import LOCK, RANKS_LOCK, JobStatus, agreed, alone_in, clear, job_status
from ..sweeps.sweep import SweepJob
from ..tracking.journal import METRICS, SUMMARY
from .launch import RankError, launch, settle
from .spec import RunSpec

log = logging.getLogger(__name__)


def run_job(cfg: DictConfig) -> float | None:
    """Hydra's job: trains, and ends the process with the right code unless it is one of a sweep.

    Returns:
        The monitored value at the end, for a sweeper that optimises it; None if the run failed.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    job = SweepJob.of(hydra)
    folder = Path(hydra.runtime.output_dir)
    outside = launched_rank()
    rank_info = outside or RankInfo()
    if not (job and rank_info.first):
        return _run(cfg, hydra, job, folder, outside, rank_info)
    with unseen(folder, job.parallel), alone_in(folder, job.title):
        return _run(cfg, hydra, job, folder, outside, rank_info)


def prove_job(cfg: DictConfig) -> None:
    """Hydra's job of a proof: ends the process with 1 if the window is not proved."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    outside = launched_rank()
    _run(cfg, hydra, None, Path(hydra.runtime.output_dir), outside, outside or RankInfo(), prove=True)


def carry_out(spec: RunSpec, rank_info: RankInfo) -> float | None:
    """Trains, or proves, in this process. The imports that takes are not for one that only launches.

    Returns:
        The monitored value at the end; of a proof 1 or 0.
    """
    if spec.prove:
        from ..prove.session import ProofSession

        return float(ProofSession(spec, rank_info).execute())
    if spec.replicas:
        from .replica_run import ReplicaRun

        return ReplicaRun(spec).execute()
    from .session import Run

    return Run(spec, rank_info).execute()


def _run(
    cfg: DictConfig,
    hydra: Any,
    job: SweepJob | None,
    folder: Path,
    outside: RankInfo | None,
    rank_info: RankInfo,
    prove: bool = False,
) -> float | None:
    try:
        before = job_status(folder) if job and rank_info.first else JobStatus()
        if before.finished and rank_info.size == 1:
            return _again(job, before)
        if prove and cfg.resume:
            raise UsageError(f"resume={cfg.resume}: a proof begins at the beginning, leave it out")
        spec = RunSpec.of(cfg, hydra, prove)
        if job and rank_info.size > 1:
            before = agreed(before, rank_info, spec.config.device)
            if before.finished:
                return _again(job if rank_info.first else None, before)
        if before.checkpoint:
            spec = spec.going_on(before.checkpoint)
        elif job and rank_info.first:
            clear(folder)
        processes = spec.config.accum.processes or 1
        if outside is None and processes > 1:
            found = launched(spec, processes)
        else:
            found = carry_out(spec, rank_info)
        if prove and not found:
            sys.exit(1)
        return found
    except Exception as error:
        expected = isinstance(error, UsageError | TrainingError)
        log.info("failed", exc_info=error)  # to run.log, not to the terminal
        if job and job.alone and isinstance(error, UsageError) and not (folder / SUMMARY).exists():
            job = None  # nobody asked for a sweep, and there is nothing of one
        if rank_info.first and isinstance(error, UsageError) and not job and not cfg.resume:
            remove_unused(folder)
        if WANTS_TRACEBACK or not expected:
            if isinstance(error, RankError):
                print(error, file=sys.stderr)
            else:
                traceback.print_exc()
        if job and rank_info.first:
            job.failed(folder, error)
        if job and (rank_info.size == 1 or "SUBMITIT_EXECUTOR" in os.environ):
            skip_group_teardown()
            return None
        code = print_error(error, "" if rank_info.first else f"rank {rank_info.rank}: ") if expected else 1
        if rank_info.size > 1:
            skip_group_teardown()
            if expected and not rank_info.first:
                # The launcher stops all ranks as soon as one ends: the first one speaks and closes before.
                time.sleep(3)
            if not (job and rank_info.first):  # which has its sweep to close
                exit_immediately(code)
        sys.exit(code)


def _again(job: SweepJob | None, before: JobStatus) -> float | None:
    """What a job that has finished before gives, without any work."""
    if job:
        print(f"{job.title}: finished before", flush=True)
    return before.monitored


def launched(spec: RunSpec, processes: int) -> float | None:
    """`spec`, carried out by ranks of its own; what is left open if they die is closed.

    Returns:
        The monitored value at the end; of a proof 1 or 0.
    """
    try:
        launch(spec, processes)
    except Exception as error:
        settle(spec.folder, "FAILED", str(error).splitlines()[0])
        raise
    except (KeyboardInterrupt, SystemExit):
        settle(spec.folder, "KILLED", None)
        raise
    if spec.prove:
        from ..tracking.certificates import proved_in

        return float(proved_in(spec.folder))
    return json.loads((spec.folder / SUMMARY).read_text()).get("monitored")


def remove_unused(folder: Path) -> None:
    """Removes a run's folder in which nothing has happened: it holds only what was made on the way in."""
    made = {".hydra", "run.log", METRICS, LOCK, RANKS_LOCK}
    if not folder.is_dir() or not {entry.name for entry in folder.iterdir()} <= made:
        return
    if not (folder / METRICS).exists() or not (folder / METRICS).stat().st_size:
        shutil.rmtree(folder, ignore_errors=True)
