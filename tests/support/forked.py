"""Processes forked from one that has imported what commands need: they start in milliseconds, not in seconds.

Each worker of the tests has one such process, which has done nothing but what `preload` does.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.preload"])


def forked(
    target: Callable[..., Any], *arguments: Any, folder: Path, env: Mapping[str, str], seconds: float
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a process of its own that calls `target(*arguments)` in `folder`."""
    with TemporaryDirectory() as streams:
        outputs = [Path(streams) / name for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=_process, args=(target, arguments, folder, dict(env), outputs))
        process.start()
        process.join(seconds)
        hangs = process.is_alive()
        if hangs:
            process.kill()
            process.join()
        stdout, stderr = (path.read_text() for path in outputs)
        assert not hangs and process.exitcode is not None, (target, arguments, stdout, stderr)
        return process.exitcode, stdout, stderr


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
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
    code: Any = 0
    try:
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
