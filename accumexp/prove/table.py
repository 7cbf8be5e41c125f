"""A certificate on the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from ..environment.console import console
from ..proof import Cause, Certificate, Check
from ..proof.certificate import number

STYLES = {"proved": "green", "proved up to": "yellow", "not proved": "red"}


def show(certificate: Certificate) -> None:
    """Prints the checks, the causes, and the verdict last."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 1), collapse_padding=True)
    table.add_column("check", overflow="fold")
    table.add_column("found", justify="right", no_wrap=True)
    table.add_column("at most", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold", style="dim")
    for check in certificate.checks:
        table.add_row(
            check.name, number(check.figure), number(check.bound), _mark(check), escape(check.detail)
        )
    console.print(table)
    for cause in certificate.causes:
        console.print()
        _explain(cause)
    console.print()
    style = STYLES[certificate.verdict]
    console.print(escape(str(certificate)), style=f"bold {style}", highlight=False, soft_wrap=True)


def _mark(check: Check) -> str:
    if not check.decided:
        return "[dim]-[/]"
    return "[green]ok[/]" if check.passed else "[bold red]differs[/]"


def _explain(cause: Cause) -> None:
    console.print(escape(cause.line), style="bold", highlight=False, soft_wrap=True)
    if cause.effect == cause.effect:
        effect = f"the update's gradient is off by {number(cause.effect)} of its norm"
        console.print(f"  effect  {effect}", highlight=False, soft_wrap=True)
    for label, text in (("shown", cause.shown), ("to do", cause.advice)):
        if text:
            console.print(f"  {label:<7} {escape(text)}", highlight=False, soft_wrap=True)
