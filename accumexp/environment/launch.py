"""Starts the ranks of a command on this machine, and raises what they raised."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ..errors import TrainingError, UsageError
from .signals import exit_code_of

EXPECTED = {error.__name__: error for error in (UsageError, TrainingError)}
WORKER = "accumexp.environment.worker"
CALL = "call.pickle"


class RankError(Exception):
    """An unexpected exception of a rank, with its traceback."""


def launch(
    function: Callable[[Any], Any], argument: Any, processes: int, logging_config: Mapping[str, Any]
) -> None:
    """Calls `function(argument)` in each of `processes` ranks on this machine and waits for their end.

    Function and argument are pickled. The ranks find their number in torchrun's environment variables.

    Args:
        logging_config: the logging of the first rank, as `logging.config.dictConfig` takes it.

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
        (folder / CALL).write_bytes(pickle.dumps((function, argument, dict(logging_config))))
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
            elastic_launch(config, sys.executable)("-m", WORKER, str(folder))
        except ChildFailedError as error:
            raise _cause(folder, error.failures) from None
        except SignalException as stop:
            raise SystemExit(exit_code_of(stop.sigval)) from None
        finally:
            for child in set(psutil.Process().children(recursive=True)) - before:
                if WORKER in _arguments(child):
                    child.kill()


def report(folder: Path, rank: int, error: BaseException) -> None:
    """Writes the exception of a rank to `folder`, where `launch` reads it."""
    import torch.distributed as dist

    kind = type(error).__name__ if isinstance(error, tuple(EXPECTED.values())) else ""
    # The error of a rank that has lost another one is not the cause.
    lost = isinstance(error, dist.DistError) or "peer" in str(error) or "Connection" in str(error)
    content = {
        "kind": kind,
        "message": str(error) or type(error).__name__,
        "traceback": "".join(traceback.format_exception(error)),
        "time": time.time(),
        "lost": lost and not kind,
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(content))


def _cause(folder: Path, failures: dict[int, Any]) -> BaseException:
    """The first failure that is not the consequence of another one, as an exception that names its rank.

    Where the ranks ended on a signal that they handled, the command exits with the same code.
    """
    reports = {int(path.stem[5:]): json.loads(path.read_text()) for path in folder.glob("rank-*.json")}
    killed = {r: f for r, f in failures.items() if f.exitcode < 0 and r not in reports}
    by_signal = {rank: f for rank, f in killed.items() if f.exitcode != -signal.SIGTERM}
    causes = {rank: one for rank, one in reports.items() if not one["lost"]}
    if by_signal:
        rank, failure = next(iter(by_signal.items()))
        return TrainingError(f"rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}")
    if candidates := causes or reports:
        rank, cause = min(candidates.items(), key=lambda item: item[1]["time"])
        if cause["kind"]:
            return EXPECTED[cause["kind"]](cause["message"])
        return RankError(f"rank {rank}: {cause['message']}\n{cause['traceback']}")
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
    """Restores the signal handlers that torch's launcher replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_elastic() -> Iterator[None]:
    """Silences torch's launcher, which prints many lines for a rank that fails."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    handled = os.environ.get("TORCHELASTIC_SIGNALS_TO_HANDLE")
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if handled is None:
            os.environ.pop("TORCHELASTIC_SIGNALS_TO_HANDLE", None)
