"""What the benchmarks share: taking turns, ratios and their quartiles, the environment, tables, reports."""

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
ORDERS = 0  # seed of the orders in which contenders take turns
console = Console()
if not console.is_terminal:
    console = Console(width=110)  # a pipe or a file has no width of its own


def in_turns(contenders: Sequence[T], turns: Iterable[Any], take: Callable[[T, Any], None]) -> None:
    """Calls `take(contender, turn)` of every contender in every turn, in a new random order each time.

    A machine whose speed drifts is then alike to all. The orders are the same in every process.
    """
    orders = random.Random(ORDERS)
    for turn in turns:
        for contender in orders.sample(contenders, len(contenders)):
            take(contender, turn)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else list(values) * 3
    return low, median, high


def ratio_of(
    own: Sequence[float], reference: Sequence[float], kinds: Sequence[int] | None = None
) -> dict[str, float]:
    """Median and quartiles of `own` over `reference`, round by round.

    `kinds` says which rounds are alike. Where they differ, because only some hold an update that is logged,
    the median of all would leave out what is rare: the ratio is then the mean of the kinds' medians,
    weighted by how many rounds are of each.
    """
    ratios = [mine / other for mine, other in zip(own, reference, strict=True)]
    low, _, high = quartiles(ratios)
    kinds = kinds or [0] * len(ratios)
    median = sum(
        count / len(ratios) * statistics.median(r for r, k in zip(ratios, kinds, strict=True) if k == kind)
        for kind, count in Counter(kinds).items()
    )
    return {"ratio": median, "ratio_low": low, "ratio_high": high}


def environment(device: torch.device, *packages: str) -> dict[str, Any]:
    """Where it was measured; versions of `packages` that are installed."""
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    found |= {"device": device_name(device), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    # What else ran here: above the number of cores, the figures are of a machine that was shared.
    found["load"] = round(os.getloadavg()[0], 2)
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def table_of(title: str, headings: str, left: str = "contender") -> Table:
    """A table of numbers; `headings` and those of them that stand on the `left` are separated by commas."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.collapse_padding = True
    for heading in headings.split(","):
        side = "left" if heading in left.split(",") else "right"
        table.add_column(heading, justify=side, no_wrap=True)
    return table


def say(text: str) -> None:
    """A line of output as it is."""
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


def known(parser: argparse.ArgumentParser, option: str, asked: Iterable[str], there: Iterable[str]) -> None:
    """Ends the command with a line about names that are not there."""
    there = list(there)
    if unknown := [name for name in asked if name not in there]:
        parser.error(f"{option}: no {', '.join(unknown)}; {', '.join(there)}")


def at_least_1(parser: argparse.ArgumentParser, values: Iterable[float | None]) -> None:
    if min(value for value in values if value is not None) < 1:
        parser.error("numbers are at least 1")


def not_installed(error: ModuleNotFoundError) -> str:
    return f"{error.name} is not installed: pip install 'accumexp[bench]'"


def output_options(parser: argparse.ArgumentParser, picture: bool = False) -> None:
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there")
    if picture:
        parser.add_argument("--picture", type=Path, metavar="PATH", help="draw them there, png or svg")


def device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="torch's own choice if left out")


def prepare(threads: int | None) -> None:
    """Threads and switches of this process, alike for all contenders."""
    if threads:
        torch.set_num_threads(threads)
    # TF32 would make the gradients of two kernels differ more than the two definitions might.
    torch.backends.cudnn.allow_tf32 = False


def with_medians(rows: Mapping[str, Sequence[float]], reference: str) -> dict[str, dict[str, Any]]:
    """Median, ratio to `reference` and all seconds of each contender, whose rounds were taken in turns."""
    return {
        name: {"median_s": statistics.median(own), **ratio_of(own, rows[reference]), "seconds": list(own)}
        for name, own in rows.items()
    }
