"""Words on the terminal: the console, and how values, durations and results are said. Imports no torch."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")
console = Console()
if not console.is_terminal:
    console = Console(width=120)  # a pipe or a file has no width of its own

# Set while the launcher of a parallel sweep shows all its jobs in one view.
VIEWED = "ACCUMEXP_VIEWED"
OUTPUT = "output.log"


@contextmanager
def unseen(folder: Path, parallel: bool) -> Iterator[None]:
    """Inside, what this process and its children write goes to `output.log`, if a view has the terminal."""
    if not (parallel and os.environ.get(VIEWED)):
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with (folder / OUTPUT).open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, before in enumerate(kept, 1):
            os.dup2(before, descriptor)
            os.close(before)


def steps(title: str, items: Sequence[Item]) -> Iterable[Item]:
    """`items` with a bar on a terminal, which goes when it is done."""
    return track(items, title, console=console, transient=True, disable=not console.is_terminal)


def show_values(title: str, values: Mapping[str, object]) -> None:
    """Names and values in two columns; addresses stay whole, so that they can be clicked and copied."""
    width = max(map(len, values))
    console.print(title, style="bold")
    for key, value in values.items():
        console.print(f"  {key:<{width}}  {value}", highlight=False, soft_wrap=True, markup=False)


def duration(seconds: float) -> str:
    """`seconds` as a person would say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return time.strftime("%H:%M:%S", time.gmtime(seconds))


def amount(size: float) -> str:
    """`size` bytes as a person would say it, rounded up: what is said to be enough is."""
    unit, factor = ("GiB", 2**30) if size >= 10 * 2**30 else ("MiB", 2**20)
    if size < 2**20:
        unit, factor = "KiB", 2**10
    return f"{math.ceil(10 * size / factor) / 10:,.1f} {unit}"


def result(final: Mapping[str, float]) -> str:
    """A finished job in one line."""
    accuracy = f"test accuracy {final['accuracy']:.4f}, " if "accuracy" in final else ""
    updates, seconds = final["updates"], duration(final["seconds"])
    return f"{accuracy}test loss {final['loss']:.4f}, {updates:.0f} updates in {seconds}"
