"""A certificate on the terminal and in MLflow's note: the verdict first; and how far a proof is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..environment.console import console, print_line
from ..errors import markdown_text
from ..proof import Cause, Certificate, Check
from ..proof.certificate import number

STYLES = {"proved": "green", "proved up to": "yellow", "not proved": "red"}
MAX_NOTE = 7500  # characters, below MLflow's limit of 8,000 for a tag
KEY_FIGURES = ("gradient, fp64", "gradient, {precision}")


def show(certificate: Certificate, verbose: bool = False) -> None:
    """Prints the verdict and its reasons, then failed checks, or all with `verbose`.

    Of a proof without a failed check a few figures are shown.
    """
    style = f"bold {STYLES[certificate.verdict]}"
    for line, cause in reasons(certificate):
        print_line(escape(line), style)
        for label, text in explained(cause):
            print_line(f"  {label:<7} {escape(text)}")
        style = "bold"
    for note in certificate.notes:
        print_line(f"note: {escape(note)}")
    checks = failed_first(certificate)
    shown = checks if verbose else certificate.failed or _key_figures(certificate)
    if shown:
        console.print()
        console.print(_table(shown))
    if len(shown) < len(checks):
        print_line(f"{passed_checks(certificate)} (-v lists them)")


def reasons(certificate: Certificate) -> Iterator[tuple[str, Cause | None]]:
    """The lines of the verdict, each with the cause it names; then the causes that are excused."""
    causes = [cause for cause in certificate.causes if not cause.excused]
    yield from zip_longest(certificate.lines, causes)
    yield from ((cause.line, cause) for cause in certificate.causes if cause.excused)


def explained(cause: Cause | None) -> list[tuple[str, str]]:
    """What is known of a cause, by label: its effect, the experiment, the remedy."""
    if cause is None:
        return []
    effect = f"the update's gradient is off by {number(cause.effect)} of its norm"
    effect = "" if math.isnan(cause.effect) else effect
    entries = [("effect", effect), ("shown", cause.shown), ("to do", cause.advice)]
    return [(label, text) for label, text in entries if text]


def failed_first(certificate: Certificate) -> list[Check]:
    """All checks: those that failed, and then the others, in their order."""
    return sorted(certificate.checks, key=lambda check: check.passed)


def mark(check: Check) -> str:
    """The result of a check in a word."""
    if not check.decided:
        return "-"
    failed = "differs" if check.about == "update" else "exceeds"
    return "ok" if check.passed else failed


def question(subject: Mapping[str, Any]) -> str:
    """What a certificate of `subject` answers; "" if the subject does not say."""
    if not {"model", "steps", "micro_batch_size", "samples"} <= subject.keys():
        return ""
    window = f"{subject['steps']} micro-batches of {subject['micro_batch_size']}"
    if subject.get("ranks", 1) > 1:
        window += f" on each of {subject['ranks']} ranks"
    return f"Is {subject['model']}'s window of {window} the batch of {subject['samples']}?"


def _key_figures(certificate: Certificate) -> list[Check]:
    """The checks of the gradient and of memory that say most about a window that is proved."""
    first = [name.format(precision=certificate.subject.get("precision", "")) for name in KEY_FIGURES]

    def key(check: Check) -> bool:
        over_updates = check.name.startswith("gradient, ") and "updates" in check.name
        return check.name in first or over_updates or check.about == "memory"

    return [check for check in certificate.checks if key(check)]


def passed_checks(certificate: Certificate) -> str:
    """How many checks did not fail, in words."""
    undecided = sum(not check.decided for check in certificate.checks)
    passed = len(certificate.checks) - undecided - len(certificate.failed)
    text = f"{passed} other checks passed" if certificate.failed else f"all {passed} checks passed"
    return text + (f", {undecided} had nothing to compare" if undecided else "")


def _table(checks: Sequence[Check]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 1), collapse_padding=True)
    table.add_column("check", overflow="fold")
    table.add_column("found", justify="right", no_wrap=True)
    table.add_column("at most", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold", style="dim")
    colours = {"ok": "green", "-": "dim"}
    for check in checks:
        word = mark(check)
        result = f"[{colours.get(word, 'bold red')}]{word}[/]"
        values = number(check.figure), number(check.bound)
        table.add_row(escape(check.name), *values, result, escape(check.detail))
    return table


def markdown(certificate: Certificate, page: str) -> str:
    """The certificate as MLflow's page of the run shows it, in at most the length of a tag.

    Args:
        page: the name of the artifact with all of it.
    """
    parts = []
    for line, cause in reasons(certificate):
        entries = [markdown_text(f"{label}: {text}") for label, text in explained(cause)]
        parts += [f"**{markdown_text(line)}**", "\n".join(f"- {entry}" for entry in entries)]
    parts += [f"Note: {markdown_text(note)}" for note in certificate.notes]
    parts.append(f"All of it, with the pictures and the source of each bound: artifact `{page}`.")
    rows = ["| check | found | at most | |", "|---|---|---|---|"]
    for check in failed_first(certificate):
        word = mark(check)
        word = word if check.passed else f"**{word}**"
        cells = markdown_text(check.name), number(check.figure), number(check.bound), word
        rows.append(f"| {' | '.join(cells)} |")
    text = "\n\n".join(part for part in [*parts, "\n".join(rows)] if part)
    return text if len(text) <= MAX_NOTE else text[:MAX_NOTE].rpartition("\n")[0] + "\n\n... cut here"


@contextmanager
def stages(title: str = "proving") -> Iterator[Callable[[str], None]]:
    """A function that shows the current stage on a terminal, behind `title`; elsewhere it has no effect.

    "update 12 of 100" is shown behind the stage that it is a part of.
    """
    if not console.is_terminal or console.quiet:
        yield lambda stage: None
        return
    columns = SpinnerColumn(), TextColumn(f"{escape(title)}: {{task.description}}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("the experiment is built", total=None)
        current = ""

        def show_stage(stage: str) -> None:
            nonlocal current
            part = stage.startswith("update ")
            current = current if part else stage
            progress.update(task, description=escape(f"{current}: {stage}" if part and current else stage))

        yield show_stage
