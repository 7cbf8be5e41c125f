"""How far a job of a sweep has come before: what is done is not done again, what can be kept is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ..environment.ranks import RankInfo
from ..errors import UsageError
from ..tracking.journal import METRICS, PROGRESS, SUMMARY, read_whole

LOCK = ".job.lock"
RANKS_LOCK = ".ranks.lock"


@dataclass(frozen=True)
class JobStatus:
    """A job that is finished, or has a checkpoint to go on from, or is to start from nothing."""

    finished: bool = False
    monitored: float | None = None
    checkpoint: Path | None = None


def job_status(folder: Path) -> JobStatus:
    """What an earlier launch left of the job in `folder`. Imports torch only for a job to go on with."""
    known = read_whole(folder / SUMMARY)
    if known.get("status") == "FINISHED":
        return JobStatus(True, known.get("monitored"))
    if not any((folder / "checkpoints").glob("update-*.pt")):
        return JobStatus()
    from ..training.checkpoint import load, saved_updates

    for candidate in reversed(saved_updates(folder / "checkpoints")):
        try:
            load(candidate)
        except UsageError:
            continue
        return JobStatus(checkpoint=candidate)
    return JobStatus()


def agreed(mine: JobStatus, rank_info: RankInfo, device: str) -> JobStatus:
    """The first rank's standing, on every rank of a world that something outside has made."""
    from ..environment.device import pick_device
    from ..environment.ranks import broadcast_from_first, device_of, process_group

    said = {"finished": mine.finished, "monitored": mine.monitored, "checkpoint": str(mine.checkpoint or "")}
    with process_group(rank_info, str(pick_device(device_of(device, rank_info)))):
        heard = json.loads(broadcast_from_first(json.dumps(said), rank_info))
    where = heard["checkpoint"]
    return JobStatus(heard["finished"], heard["monitored"], Path(where) if where else None)


def clear(folder: Path) -> None:
    """Removes what a job that starts anew would mistake for its own; `run.log` is kept."""
    for name in (SUMMARY, METRICS, PROGRESS, "code.diff"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def held(folder: Path) -> bool:
    """Whether a process that lives carries out the job in `folder`."""
    try:
        for name in (LOCK, RANKS_LOCK):
            if (folder / name).exists():
                with FileLock(folder / name, timeout=0):
                    pass
    except Timeout:
        return True
    return False


@contextmanager
def alone_in(folder: Path, name: str) -> Iterator[None]:
    """Inside, no other process carries out the job in `folder`; says so in one line if it has to wait.

    The system gives the lock back however its holder ends. A sweep's launcher may be dead while a job of
    it lives on in a worker, or in the ranks that the worker started.
    """
    lock = FileLock(folder / LOCK)
    try:
        try:
            lock.acquire(timeout=0)
            with FileLock(folder / RANKS_LOCK, timeout=0):
                pass
        except Timeout:
            print(f"{name}: still runs in another process, waiting for it", flush=True)
            lock.acquire()
            with FileLock(folder / RANKS_LOCK):
                pass
        yield
    finally:
        lock.release(force=True)
