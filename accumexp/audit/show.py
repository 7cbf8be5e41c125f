"""Cells and certificates of an audit on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from rich.markup import escape

from ..environment.console import print_line, show_values
from ..proof import Certificate
from ..prove import show as prove_show
from .cells import EQUAL, UNDECIDED, UNEQUAL, Cell

STYLES = {EQUAL: "green", UNEQUAL: "bold red", UNDECIDED: "yellow"}


def stages(title: str) -> AbstractContextManager[Callable[[str], None]]:
    """A function that shows what is being done, on a terminal."""
    return prove_show.stages(f"auditing {title}")


def show_cell(cell: Cell, alone: bool = False) -> None:
    """Prints the verdict of a cell in a line, with its first reason."""
    trainer = f"{cell.trainer} {cell.version}".strip()
    verdict = f"[{STYLES[cell.verdict]}]{cell.verdict}[/]"
    reason = "" if alone and cell.verdict != UNDECIDED else cell.reason
    print_line(f"{escape(trainer):<22} {cell.setting:<24} {verdict}{': ' if reason else ''}{escape(reason)}")


def show_certificate(certificate: Certificate, verbose: bool) -> None:
    prove_show.show(certificate, verbose)


def show_locations(locations: Mapping[str, object]) -> None:
    show_values("kept", locations)


def show_left_out(line: str) -> None:
    print_line(escape(line), "dim")


def show_total(cells: Sequence[Cell]) -> None:
    if len(cells) > 1:
        print_line(", ".join(_totals(cells)))


def _totals(cells: Sequence[Cell]) -> Iterator[str]:
    for verdict in STYLES:
        if count := sum(cell.verdict == verdict for cell in cells):
            yield f"{count} {verdict}"
