"""Processes forked from one that has imported what commands need: they start in milliseconds, not in seconds.

There is one such process, which has done nothing but what `preload` does, and all workers of the tests share
it. The ranks that a forked command launches are forked from it too; with FRESH_RANKS in its environment they
start as users' do.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FRESH_RANKS = {"ACCUMEXP_TEST_RANKS": "fresh"}
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = "tests.support.preload"
CONTEXT.set_forkserver_preload([PRELOAD])
SHARED = "ACCUMEXP_TEST_SERVER"  # the address of the process that all workers fork from
SERVER: Any = getattr(forkserver, "_forkserver")  # noqa: B009


def share_server() -> None:
    """Starts the process to fork from, which the workers that this process starts use too."""
    kept = [(number, os.dup(number)) for number in (1, 2)]
    silent = os.open(os.devnull, os.O_WRONLY)
    for number, _ in kept:
        os.dup2(silent, number)  # libraries that it has imported may write to them when it ends
    forkserver.ensure_running()
    for number, stream in kept:
        os.dup2(stream, number)
        os.close(stream)
    os.close(silent)
    os.environ[SHARED] = SERVER._forkserver_address


def _use(address: str) -> None:
    """Forks from the server at `address`, which another process has started."""
    SERVER._forkserver_address = address
    SERVER._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # a forked process is sent one
    SERVER.ensure_running = lambda: None


if SHARED in os.environ:
    _use(os.environ[SHARED])


def forked(
    target: Callable[..., Any], *arguments: Any, folder: Path, env: Mapping[str, str], seconds: float
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a process of its own that calls `target(*arguments)` in `folder`."""
    with TemporaryDirectory() as streams:
        outputs = [Path(streams) / name for name in ("stdout", "stderr")]
        process = started(target, *arguments, folder=folder, env=env, outputs=outputs)
        process.join(seconds)
        hangs = process.is_alive()
        if hangs:
            process.kill()
            process.join()
        stdout, stderr = (path.read_text() for path in outputs)
        assert not hangs and process.exitcode is not None, (target, arguments, stdout, stderr)
        return process.exitcode, stdout, stderr


def started(
    target: Callable[..., Any], *arguments: Any, folder: Path, env: Mapping[str, str], outputs: list[Path]
) -> Any:
    """The process of `forked`, which runs; `outputs` are the files of its stdout and stderr."""
    process = CONTEXT.Process(target=_process, args=(target, arguments, folder, dict(env), outputs))
    process.start()
    return process


def as_main(module: str, arguments: list[str]) -> None:
    """What `python -m <module> <arguments>` does."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _process(
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
    folder: Path,
    env: dict[str, str],
    outputs: list[Path],
) -> None:
    """`target` with the environment, the streams and the end of a process that was not forked."""
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [str(folder), *env["PYTHONPATH"].split(os.pathsep)]
    os.chdir(folder)
    _fork_ranks(outputs)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    code: Any = 0
    try:
        # An import that fails in the server is passed over in silence.
        assert PRELOAD in sys.modules, f"{PRELOAD} cannot be imported"
        importlib.reload(sys.modules["accumexp.cli"])
        target(*arguments)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    getattr(threading, "_shutdown")()  # noqa: B009  waits for threads, as Python does before it ends
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


class _Rank:
    """A forked `python -m <module> <arguments>`, with what torch's launcher uses of a `subprocess.Popen`."""

    def __init__(self, line: tuple[str, ...], env: dict[str, str], outputs: list[Path]) -> None:
        module, *arguments = line[2:]
        rank = (as_main, (module, arguments), Path.cwd(), env, outputs)
        self.process = CONTEXT.Process(target=_leader, args=rank)
        main, sys.modules["__main__"] = sys.modules["__main__"], sys.modules[__name__]
        try:
            self.process.start()
        finally:
            sys.modules["__main__"] = main
        assert self.process.pid is not None
        self.pid = self.process.pid
        while self.process.exitcode is None and os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout or 0)
        return self.process.exitcode


def _leader(*arguments: Any) -> None:
    """A process that leads a group of its own, which the launcher sends signals to."""
    os.setsid()
    _process(*arguments)


def _fork_ranks(outputs: list[Path]) -> None:
    """Makes torch's launcher fork the ranks of this process's run, with its streams."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import (
        SubprocessHandler,
    )

    start_fresh = SubprocessHandler._popen

    def popen(self: Any, args: tuple[str, ...], env: dict[str, str]) -> Any:
        is_rank = args[1:3] == ("-m", "accumexp.environment.worker")
        forks = is_rank and not FRESH_RANKS.keys() & env.keys()
        return _Rank(args, env, outputs) if forks else start_fresh(self, args, env)

    SubprocessHandler._popen = popen
    # A forked process knows the address of the server that it comes from, not that this still runs.
    SERVER.ensure_running = lambda: None
