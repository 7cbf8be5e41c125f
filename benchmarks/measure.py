"""Shared by the benchmarks: turns, ratios and quartiles, the environment, tables, reports, options."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from accumexp.environment.device import device_name

Rows = list[dict[str, Any]]
T = TypeVar("T")
ORDERS = 0  # seed of the orders in which loops take turns
console = Console()
if not console.is_terminal:
    console = Console(width=110)  # a pipe or a file has no width


def in_turns(loops: Sequence[T], turns: Iterable[Any], take: Callable[[T, Any], None]) -> None:
    """Calls `take(loop, turn)` of every loop in every turn, in a new random order each time.

    All are then affected alike by a machine whose speed changes. Every process uses the same orders.
    """
    orders = random.Random(ORDERS)
    for turn in turns:
        for loop in orders.sample(loops, len(loops)):
            take(loop, turn)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else list(values) * 3
    return low, median, high


def ratio_of(
    seconds: Sequence[float], reference: Sequence[float], kinds: Sequence[int] | None = None
) -> dict[str, float]:
    """Median and quartiles of `seconds` divided by `reference`, round by round.

    Rounds may be of several `kinds`, of which only some hold a logged update. The median of all rounds would
    ignore a rare kind, so the ratio is the mean of the kinds' medians, weighted by their numbers of rounds.
    """
    ratios = [value / other for value, other in zip(seconds, reference, strict=True)]
    low, _, high = quartiles(ratios)
    kinds = kinds or [0] * len(ratios)
    median = sum(
        count / len(ratios) * statistics.median(r for r, k in zip(ratios, kinds, strict=True) if k == kind)
        for kind, count in Counter(kinds).items()
    )
    return {"ratio": median, "ratio_low": low, "ratio_high": high}


def environment(device: torch.device, *packages: str) -> dict[str, Any]:
    """The machine that was measured on, and the versions of `packages` that are installed."""
    values: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    values |= {"device": device_name(device), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    # Above the number of cores, other programs ran at the same time.
    values["load"] = round(os.getloadavg()[0], 2)
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            values[package] = version(package)
    return values


def table_of(title: str, headings: str, left: str = "loop") -> Table:
    """A table of numbers. `headings`, and those that are `left`-aligned, are separated by commas."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.collapse_padding = True
    for heading in headings.split(","):
        side = "left" if heading in left.split(",") else "right"
        table.add_column(heading, justify=side, no_wrap=True)
    return table


def say(text: str) -> None:
    """Prints a line without markup or wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def finish(report: dict[str, Any], tables: Iterable[Table], path: Path | None) -> None:
    """Prints tables, settings and environment, and writes the report to `path` if there is one."""
    for table in tables:
        console.print(table)
    for part in ("settings", "environment"):
        say(f"{part}: " + ", ".join(f"{key} {shown(value)}" for key, value in report[part].items()))
    if path:
        path.write_text(json.dumps(report, indent=2) + "\n")


def shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def check_names(
    parser: argparse.ArgumentParser, option: str, names: Iterable[str], choices: Iterable[str]
) -> None:
    """Ends the command with an error of one line if `names` are not all `choices`."""
    choices = list(choices)
    if unknown := [name for name in names if name not in choices]:
        parser.error(f"{option}: no {', '.join(unknown)}; {', '.join(choices)}")


def at_least_1(parser: argparse.ArgumentParser, values: Iterable[float | None]) -> None:
    if min(value for value in values if value is not None) < 1:
        parser.error("numbers are at least 1")


def not_installed(error: ModuleNotFoundError) -> str:
    return f"{error.name} is not installed: pip install 'accumexp[bench]'"


def output_options(parser: argparse.ArgumentParser, picture: bool = False) -> None:
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures to this file")
    if picture:
        parser.add_argument("--picture", type=Path, metavar="PATH", help="draw them to this file, png or svg")


def device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="without it torch chooses")


def prepare(threads: int | None) -> None:
    """Sets the threads and switches of this process, the same for all loops."""
    if threads:
        torch.set_num_threads(threads)
    # TF32 rounds so much that equal definitions computed by two kernels would differ.
    torch.backends.cudnn.allow_tf32 = False


def with_medians(rows: Mapping[str, Sequence[float]], reference: str) -> dict[str, dict[str, Any]]:
    """Median, ratio to `reference` and all seconds of each row, whose rounds were taken in turns."""
    return {
        name: {"median_s": statistics.median(values), **ratio_of(values, rows[reference])}
        | {"seconds": list(values)}
        for name, values in rows.items()
    }
