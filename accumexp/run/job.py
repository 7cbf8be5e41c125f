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

from ..cli import WANTS_TRACEBACK, fail
from ..environment.console import unseen
from ..environment.ranks import World, abandon, end_now, world
from ..errors import TrainingError, UsageError
from ..sweeps.job_status import LOCK, RANKS_LOCK, Standing, agreed, alone_in, clear, standing
from ..sweeps.sweep import SweepJob
from ..tracking.journal import METRICS, SUMMARY
from .launch import RankError, launch, settle
from .spec import Order

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
    outside = world()
    here = outside or World()
    if not (job and here.first):
        return _run(cfg, hydra, job, folder, outside, here)
    with unseen(folder, job.parallel), alone_in(folder, job.title):
        return _run(cfg, hydra, job, folder, outside, here)


def prove_job(cfg: DictConfig) -> None:
    """Hydra's job of a proof: ends the process with 1 if the window is not proved."""
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    outside = world()
    _run(cfg, hydra, None, Path(hydra.runtime.output_dir), outside, outside or World(), prove=True)


def carry_out(order: Order, here: World) -> float | None:
    """Trains, or proves, in this process. The imports that takes are not for one that only launches.

    Returns:
        The monitored value at the end; of a proof 1 or 0.
    """
    if order.prove:
        from ..prove.session import Certifying

        return float(Certifying(order, here).execute())
    if order.replicas:
        from .replica_run import JointRun

        return JointRun(order).execute()
    from .session import Run

    return Run(order, here).execute()


def _run(
    cfg: DictConfig,
    hydra: Any,
    job: SweepJob | None,
    folder: Path,
    outside: World | None,
    here: World,
    prove: bool = False,
) -> float | None:
    try:
        before = standing(folder) if job and here.first else Standing()
        if before.finished and here.size == 1:
            return _again(job, before)
        if prove and cfg.resume:
            raise UsageError(f"resume={cfg.resume}: a proof begins at the beginning, leave it out")
        order = Order.of(cfg, hydra, prove)
        if job and here.size > 1:
            before = agreed(before, here, order.config.device)
            if before.finished:
                return _again(job if here.first else None, before)
        if before.checkpoint:
            order = order.going_on(before.checkpoint)
        elif job and here.first:
            clear(folder)
        processes = order.config.accum.processes or 1
        if outside is None and processes > 1:
            found = launched(order, processes)
        else:
            found = carry_out(order, here)
        if prove and not found:
            sys.exit(1)
        return found
    except Exception as error:
        expected = isinstance(error, UsageError | TrainingError)
        log.info("failed", exc_info=error)  # to run.log, not to the terminal
        if job and job.alone and isinstance(error, UsageError) and not (folder / SUMMARY).exists():
            job = None  # nobody asked for a sweep, and there is nothing of one
        if here.first and isinstance(error, UsageError) and not job and not cfg.resume:
            remove_unused(folder)
        if WANTS_TRACEBACK or not expected:
            if isinstance(error, RankError):
                print(error, file=sys.stderr)
            else:
                traceback.print_exc()
        if job and here.first:
            job.failed(folder, error)
        if job and (here.size == 1 or "SUBMITIT_EXECUTOR" in os.environ):
            abandon()
            return None
        code = fail(error, "" if here.first else f"rank {here.rank}: ") if expected else 1
        if here.size > 1:
            abandon()
            if expected and not here.first:
                # The launcher stops all ranks as soon as one ends: the first one speaks and closes before.
                time.sleep(3)
            if not (job and here.first):  # which has its sweep to close
                end_now(code)
        sys.exit(code)


def _again(job: SweepJob | None, before: Standing) -> float | None:
    """What a job that has finished before gives, without any work."""
    if job:
        print(f"{job.title}: finished before", flush=True)
    return before.monitored


def launched(order: Order, processes: int) -> float | None:
    """`order`, carried out by ranks of its own; what is left open if they die is closed.

    Returns:
        The monitored value at the end; of a proof 1 or 0.
    """
    try:
        launch(order, processes)
    except Exception as error:
        settle(order.folder, "FAILED", str(error).splitlines()[0])
        raise
    except (KeyboardInterrupt, SystemExit):
        settle(order.folder, "KILLED", None)
        raise
    if order.prove:
        from ..tracking.certificates import proved_in

        return float(proved_in(order.folder))
    return json.loads((order.folder / SUMMARY).read_text()).get("monitored")


def remove_unused(folder: Path) -> None:
    """Removes a run's folder in which nothing has happened: it holds only what was made on the way in."""
    made = {".hydra", "run.log", METRICS, LOCK, RANKS_LOCK}
    if not folder.is_dir() or not {entry.name for entry in folder.iterdir()} <= made:
        return
    if not (folder / METRICS).exists() or not (folder / METRICS).stat().st_size:
        shutil.rmtree(folder, ignore_errors=True)
