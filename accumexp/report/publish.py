"""Where a report goes: the sweep's folder, the terminal, and the record of the parent run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.report import report_from
from ..environment.console import console, steps
from .analysis import Report, costs, make_report
from .groups import varied_params
from .jobs import Sweep
from .page import page
from .pictures import draw
from .statistics import Verdict
from .tables import (
    COST_COLUMNS,
    accuracy_cells,
    accuracy_columns,
    cost_cells,
    group_rows,
    job_rows,
    markdown,
    terminal,
    write_csv,
)
from .tables import show as show_tables
from .wording import conclusion, noise_conclusion, outcome

FOLDER = "report"
PAGE = "report.html"
# Of MLflow, with room to spare: 8,000 characters a tag, 250 a metric's name.
LONGEST_TAG, LONGEST_NAME = 7500, 200


@dataclass(frozen=True)
class Written:
    """The files of a report."""

    folder: Path
    page: Path
    files: list[Path]


def publish(
    sweep: Sweep, changes: Mapping[str, str], folder: Path | None = None, files: bool = True
) -> Report:
    """Makes the report of `sweep` and shows it; with `files`, writes it, and keeps it with the parent.

    Args:
        changes: `report.*` settings instead of those that the sweep was run with.
        folder: for the files; the sweep's own if it is on this machine.

    Raises:
        UsageError: for a setting that is wrong, naming it.
    """
    params = next((job.params for job in sweep.jobs if job.params), {})
    config = report_from(params, changes)
    report = make_report(sweep, config, lambda jobs: steps("reading the runs", jobs))
    show(report)
    if not (files and (config.write or changes or folder)):
        return report
    where = folder or (sweep.folder or Path.cwd() / f"report-{sweep.run_id}") / FOLDER
    written = write(report, where)
    console.print(f"report  {written.page}", highlight=False, soft_wrap=True, markup=False)
    record(report, written)
    return report


def write(report: Report, folder: Path) -> Written:
    """Page, pictures and CSV, in `folder`, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(report, folder)
    html = folder / PAGE
    html.write_text(page(report, pictures), encoding="utf-8")
    tables = [
        write_csv(folder / "groups.csv", group_rows(report)),
        write_csv(folder / "jobs.csv", job_rows(report)),
    ]
    return Written(folder, html, [html, *pictures.values(), *tables])


def show(report: Report) -> None:
    """The tables and the verdict, in the terminal."""
    show_tables(terminal(report, console.width if console.is_terminal else None))

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=not console.is_terminal)

    say(conclusion(report))
    for row in report.comparisons:
        if row.comparison and row.comparison.verdict is not Verdict.equivalent:
            say(f"  {row.group.label}: {outcome(row.comparison, report)}")
    answer = noise_conclusion(report)
    if answer:
        say(answer)
    for job in report.sweep.unfinished:
        say(
            f"  left out: {job.overrides_text}: {job.status}" + (f": {job.error}" if job.error else ""),
            "yellow",
        )


def record(report: Report, written: Written) -> None:
    """The report as artifacts, metrics, tags and note of the parent run, if the sweep has one."""
    sweep = report.sweep
    if sweep.store is None or sweep.run_id is None:
        return
    store, run_id = sweep.store, sweep.run_id
    for path in written.files:
        store.client.log_artifact(run_id, str(path), FOLDER)
    store.log_once(run_id, metrics(report))
    for key, value in tags(report).items():
        store.client.set_tag(run_id, key, value)
    store.arrange_sweep(run_id, varied_params([row.group for row in report.rows]), report.measure.key)


def metrics(report: Report) -> dict[str, float]:
    """`final/<what>/<group>` of every group, in names that MLflow takes."""
    found: dict[str, float] = {}
    names: set[str] = set()
    for number, row in enumerate(report.rows, 1):
        name = re.sub(r"[^\w.\- ]+", " ", row.group.label)[:LONGEST_NAME].strip(" .")
        name += f" - {number}" if name in names else ""
        names.add(name)
        key = report.measure.key
        factor = report.measure.factor  # the jobs' own unit, as their final/* have it
        values = {
            key: row.value.mean / factor,
            f"{key}_std": row.value.std / factor,
            **vars(costs(row.group)),
        }
        if row.comparison:
            values[f"{key}_difference"] = row.comparison.difference.mean / factor
        for what, value in values.items():
            if value is not None and not math.isnan(value):
                found[f"final/{what}/{name}"] = value
    return found


def tags(report: Report) -> dict[str, str]:
    """The verdicts, and the note that the UI shows."""
    found = {"mlflow.note.content": note(report)}
    if report.verdict:
        found["accumexp.verdict"] = report.verdict.value
        verdicts = {
            row.group.label: row.comparison.verdict.value for row in report.comparisons if row.comparison
        }
        found["accumexp.verdicts"] = _fitting(list(verdicts.items()), dict)
        if report.margin is not None:
            found["accumexp.margin"] = report.measure.amount(report.margin)
    refused = [
        {"overrides": [f"{key}={value}" for key, value in job.overrides.items()], "error": job.error}
        for job in report.sweep.jobs
        if job.run_id is None
    ]
    if refused:
        found["accumexp.refused"] = _fitting(refused, list)
    return found


def _fitting(entries: Sequence[Any], form: Callable[[Sequence[Any]], Any]) -> str:
    """As many of the entries as a tag holds, as JSON."""
    text = json.dumps(form(entries))
    return text if len(text) <= LONGEST_TAG else _fitting(entries[: len(entries) // 2], form)


def note(report: Report) -> str:
    """The report as markdown, of the length that a note may have."""
    parts = [f"**{conclusion(report)}**"]
    if report.rows:
        keys = list(report.rows[0].group.values)
        cells = [accuracy_cells(report, row) for row in report.rows]
        parts.append(markdown(accuracy_columns(report), cells))
        paid = [[*row.group.values.values(), *cost_cells(row.group, row.reference)] for row in report.rows]
        parts.append(markdown([*keys, *COST_COLUMNS], paid))
    answer = noise_conclusion(report)
    if answer:
        parts.append(answer)
    if report.sweep.unfinished:
        parts.append(
            "\n".join(
                f"- left out: `{job.overrides_text}`: {job.status} {job.error or ''}"
                for job in report.sweep.unfinished
            )
        )
    parts.append(f"The whole report, with pictures: artifact `{FOLDER}/{PAGE}`.")
    text = "\n\n".join(parts)
    return text if len(text) <= LONGEST_TAG else text[:LONGEST_TAG] + "\n\n... cut here; the page has it all"
