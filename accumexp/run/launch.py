"""Starting a run's ranks on this machine, and telling what became of them."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf

from ..config.loading import from_hydra
from ..errors import TrainingError, UsageError
from ..tracking.journal import SUMMARY, write_whole
from .spec import CONFIG, RunSpec

EXPECTED = {error.__name__: error for error in (UsageError, TrainingError)}


class RankError(Exception):
    """A rank failed by a bug; holds its traceback."""


def launch(spec: RunSpec, processes: int) -> None:
    """Carries out `spec` in `processes` ranks of this machine and waits for their end.

    Raises:
        UsageError, TrainingError: what a rank raised, or that one was killed.
        RankError: for any other exception of a rank.
        SystemExit: after SIGINT or SIGTERM, when the ranks have ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="accumexp-") as temporary, _signals_restored(), _quiet_elastic():
        folder = Path(temporary)
        spec.write(folder / "order.json")
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
        )
        before = set(psutil.Process().children(recursive=True))
        try:
            elastic_launch(config, sys.executable)("-m", "accumexp.run.rank", str(folder))
        except ChildFailedError as error:
            raise _cause(folder, error.failures) from None
        except SignalException as stop:
            raise SystemExit(128 + stop.sigval) from None
        finally:
            for child in set(psutil.Process().children(recursive=True)) - before:
                if "accumexp.run.rank" in _arguments(child):
                    child.kill()


def report(folder: Path, rank: int, error: BaseException) -> None:
    """Leaves what happened in a rank where `launch` finds it."""
    import torch.distributed as dist

    kind = type(error).__name__ if isinstance(error, tuple(EXPECTED.values())) else ""
    # A rank whose neighbour is gone says so; that is never the cause.
    lost = isinstance(error, dist.DistError) or "peer" in str(error) or "Connection" in str(error)
    written = {
        "kind": kind,
        "message": str(error) or type(error).__name__,
        "traceback": "".join(traceback.format_exception(error)),
        "time": time.time(),
        "lost": lost and not kind,
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(written))


def _cause(folder: Path, failures: dict[int, Any]) -> BaseException:
    """The first failure that no other explains, as an exception that names its rank.

    Ranks that were stopped by a signal of their own ended as they should: the command does so too.
    """
    reports = {int(path.stem[5:]): json.loads(path.read_text()) for path in folder.glob("rank-*.json")}
    killed = {r: f for r, f in failures.items() if f.exitcode < 0 and r not in reports}
    unasked = {rank: f for rank, f in killed.items() if f.exitcode != -signal.SIGTERM}
    own = {rank: found for rank, found in reports.items() if not found["lost"]}
    if unasked:
        rank, failure = next(iter(unasked.items()))
        return TrainingError(f"rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}")
    for candidates in (own, reports):
        if candidates:
            rank, found = min(candidates.items(), key=lambda item: item[1]["time"])
            if found["kind"]:
                return EXPECTED[found["kind"]](found["message"])
            return RankError(f"rank {rank}: {found['message']}\n{found['traceback']}")
    rank, failure = next(iter(failures.items()))
    if failure.exitcode in (130, 143):
        return SystemExit(failure.exitcode)
    return TrainingError(f"rank {rank} (process {failure.pid}) ended with exit code {failure.exitcode}")


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Puts back the handlers that the launcher replaces and leaves behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_elastic() -> Iterator[None]:
    """What the launcher would print of a failing rank is said in one line by us."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    asked = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE")
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if asked is None:
            os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)


def settle(folder: Path, status: str, error: str | None) -> None:
    """Closes the record of a run whose ranks ended without doing so, and corrects the cause they gave."""
    path = folder / SUMMARY
    if not path.exists():
        return
    known = json.loads(path.read_text())
    unclosed = known["status"] == "RUNNING"
    if unclosed or error and known["status"] == "FAILED":
        known.update(status=status, error=error)
        write_whole(path, known)
    written = folder / CONFIG
    if unclosed and known["run_id"] and written.exists():
        from ..tracking import Store

        saved = OmegaConf.load(written)
        assert isinstance(saved, DictConfig)
        Store(from_hydra(saved).tracking).client.set_terminated(known["run_id"], status)
