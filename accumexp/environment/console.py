"""The console, and the text form of values, durations and results. Imports no torch."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")
log = logging.getLogger(__name__)


class LoggedConsole(Console):
    """A console whose printed lines are also written into the files of the log, such as `run.log`."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **options)
        files = [one for one in logging.getLogger().handlers if isinstance(one, logging.FileHandler)]
        if not files or not log.isEnabledFor(logging.INFO):
            return
        text = StringIO()
        Console(file=text, width=self.width, emoji=False).print(*objects, **options)
        for line in text.getvalue().splitlines():
            record = log.makeRecord(log.name, logging.INFO, "", 0, line.rstrip(), (), None)
            for file in files:
                file.handle(record)


console = LoggedConsole(emoji=False)  # the names of emoji are a table to import
if not console.is_terminal:
    console = LoggedConsole(width=120, emoji=False)  # a pipe or a file has no width of its own

# Set while the launcher of a parallel sweep shows all its jobs in one view.
VIEWED = "ACCUMEXP_VIEWED"
OUTPUT = "output.log"


@contextmanager
def output_to_log(folder: Path, parallel: bool) -> Iterator[None]:
    """Redirects the output of this process and its children to `output.log` while a view has the terminal."""
    if not (parallel and os.environ.get(VIEWED)):
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with (folder / OUTPUT).open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in enumerate(saved, 1):
            os.dup2(original, descriptor)
            os.close(original)


def steps(title: str, items: Sequence[Item]) -> Iterable[Item]:
    """`items` with a progress bar on a terminal, removed at the end."""
    return track(items, title, console=console, transient=True, disable=not console.is_terminal)


def print_line(text: str | None, style: str | None = None, markup: bool = True) -> None:
    """Prints `text` without highlighting; the terminal wraps it, so that it can be copied whole."""
    console.print(text, style=style, markup=markup, highlight=False, soft_wrap=True)


def show_values(title: str, values: Mapping[str, object]) -> None:
    """Names and values in two columns; addresses stay whole, so that they can be clicked and copied.

    A value of several lines begins each in the second column.
    """
    width = max(map(len, values))
    console.print(title, style="bold")
    for key, value in values.items():
        for number, part in enumerate(str(value).splitlines()):
            print_line(f"  {key if number == 0 else '':<{width}}  {part}", markup=False)


def duration(seconds: float) -> str:
    """`seconds` with its unit below a minute, else as HH:MM:SS."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return time.strftime("%H:%M:%S", time.gmtime(seconds))


def amount(size: float) -> str:
    """`size` bytes in KiB, MiB or GiB, rounded up, so that a stated amount suffices."""
    unit, factor = ("GiB", 2**30) if size >= 10 * 2**30 else ("MiB", 2**20)
    if size < 2**20:
        unit, factor = "KiB", 2**10
    return f"{math.ceil(10 * size / factor) / 10:,.1f} {unit}"


def number(value: float) -> str:
    """A metric's value with four digits after the point, or four significant ones if it is large or tiny."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or not value else f"{value:.4g}"


def scores(final: Mapping[str, float], monitor: str = "") -> str:
    """The accuracy, the monitored metric and the loss of the test split, as far as there are such.

    Args:
        final: the values of `final/*` by key.
        monitor: such as `eval/mae`.
    """
    names = dict.fromkeys(["accuracy", monitor.partition("/")[2].removeprefix("ema_"), "loss"])
    return ", ".join(f"test {name} {number(final[name])}" for name in names if name in final)


def result(final: Mapping[str, float], monitor: str = "") -> str:
    """The results of a finished job in one line."""
    return f"{scores(final, monitor)}, {final['updates']:.0f} updates in {duration(final['seconds'])}"
