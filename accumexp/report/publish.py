"""Writes a report to the terminal, to files and to the sweep's parent run in MLflow."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.overrides import report_from
from ..environment.console import console, steps
from ..errors import markdown_text
from .analysis import Report, make_report
from .groups import varied_params
from .headline import headline
from .jobs import Sweep
from .page import page
from .pictures import draw
from .statistics import Verdict
from .tables import all_tables, group_rows, job_rows, print_tables, terminal_tables, write_csv
from .wording import conclusion, noise_conclusion, reason

FOLDER = "report"
PAGE = "report.html"
# Below MLflow's limits: 8,000 characters of a tag, 250 of a metric's name.
MAX_TAG, MAX_NAME = 7500, 200


def publish(
    sweep: Sweep, changes: Mapping[str, str], folder: Path | None = None, files: bool = True
) -> Report:
    """Makes the report of `sweep` and prints it; with `files`, also writes it and logs it to the parent run.

    Args:
        changes: settings `report.*` that replace those of the sweep.
        folder: for the files; by default `report` in the sweep's folder, if that is on this machine.
    """
    params = next((job.params for job in sweep.jobs if job.params), {})
    config = report_from(params, changes)
    report = make_report(sweep, config, lambda jobs: steps("reading the runs", jobs))
    print_report(report)
    if files and (config.write or changes or folder):
        default = (sweep.folder or Path.cwd() / f"report-{sweep.run_id}") / FOLDER
        paths = write(report, folder or default)
        console.print(f"report  {paths[0]}", highlight=False, soft_wrap=True, markup=False)
        log_to_parent_run(report, paths)
    return report


def write(report: Report, folder: Path) -> list[Path]:
    """Writes page, pictures and CSV files into `folder`; returns their paths, the page first."""
    folder.mkdir(parents=True, exist_ok=True)
    html, groups, jobs = (folder / name for name in (PAGE, "groups.csv", "jobs.csv"))
    pictures = draw(report, folder)
    html.write_text(page(report, pictures), encoding="utf-8")
    write_csv(groups, group_rows(report))
    write_csv(jobs, job_rows(report))
    return [html, *(picture.path for picture in pictures.values()), groups, jobs]


def print_report(report: Report) -> None:
    """Prints the tables, the verdicts and the jobs that are left out."""
    print_tables(terminal_tables(report, console.width if console.is_terminal else None))

    def write_line(text: str, style: str | None = None, whole: bool = not console.is_terminal) -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=whole)

    write_line(conclusion(report))
    for comparison in report.comparisons:
        if comparison.verdict is not Verdict.equivalent:
            write_line(f"  {comparison.group.label}: {reason(comparison, report)}")
    claims = headline(report)
    for sentence in claims.established:
        write_line(f"  established: {sentence}")
    if claims.command:
        # Whole, so that the command can be copied.
        write_line(
            f"  not established: whether the update is the larger batch's; shown by {claims.command}",
            whole=True,
        )
    noise = noise_conclusion(report)
    if noise:
        write_line(noise)
    for job in report.sweep.unfinished:
        error = f": {job.error}" if job.error else ""
        write_line(f"  left out: {job.overrides_text}: {job.status}{error}", "yellow")


def log_to_parent_run(report: Report, paths: Sequence[Path]) -> None:
    """Logs files, metrics, tags and note to the sweep's parent run, if there is one."""
    store, run_id = report.sweep.store, report.sweep.run_id
    if store is None or run_id is None:
        return
    for path in paths:
        store.client.log_artifact(run_id, str(path), FOLDER)
    store.log_once(run_id, metrics(report))
    for key, value in tags(report).items():
        store.client.set_tag(run_id, key, value)
    for row in report.rows:
        for job in row.group.jobs.values():
            if job.run_id:
                store.client.set_tag(job.run_id, "accumexp.group", row.group.label)
    store.arrange_sweep(run_id, varied_params([row.group for row in report.rows]), report.metric.key)


def metrics(report: Report) -> dict[str, float]:
    """`final/<metric>/<group>` of all groups, under names that MLflow accepts and in the jobs' own unit."""
    logged: dict[str, float] = {}
    names: set[str] = set()
    key, factor = report.metric.key, report.metric.factor
    for number, row in enumerate(report.rows, 1):
        name = re.sub(r"[^\w.\- ]+", " ", row.group.label)[:MAX_NAME].strip(" .")
        name += f" - {number}" if name in names else ""
        names.add(name)
        values: dict[str, float | None] = {key: row.value.mean / factor, f"{key}_std": row.value.std / factor}
        values |= row.group.costs()
        if row.comparison:
            values[f"{key}_difference"] = row.comparison.difference.mean / factor
        for metric, value in values.items():
            if value is not None and not math.isnan(value):
                logged[f"final/{metric}/{name}"] = value
    return logged


def tags(report: Report) -> dict[str, str]:
    """The verdicts, the refused jobs, and the note that MLflow's UI shows."""
    values = {"mlflow.note.content": note(report)}
    if report.verdict:
        values["accumexp.verdict"] = report.verdict.value
        verdicts = [(comparison.group.label, comparison.verdict.value) for comparison in report.comparisons]
        values["accumexp.verdicts"] = _json_tag(verdicts, dict)
        values["accumexp.margin"] = report.margin_text
    refused = [
        {"overrides": [f"{key}={value}" for key, value in job.overrides.items()], "error": job.error}
        for job in report.sweep.jobs
        if job.run_id is None
    ]
    if refused:
        values["accumexp.refused"] = _json_tag(refused, list)
    return values


def _json_tag(entries: list[Any], container: type) -> str:
    """`entries` in a list or dict as JSON, the first of them if all do not fit into a tag."""
    while len(text := json.dumps(container(entries))) > MAX_TAG:
        entries = entries[: len(entries) // 2]
    return text


def note(report: Report) -> str:
    """The report as markdown, of at most the length of a tag."""
    tables = [table.markdown() for table in all_tables(report)] if report.rows else []
    left_out = [
        f"- left out: {markdown_text(f'{job.overrides_text}: {job.status} {job.error or str()}')}"
        for job in report.sweep.unfinished
    ]
    footer = f"The whole report, with pictures: artifact `{FOLDER}/{PAGE}`."
    verdict, noise = (markdown_text(text or "") for text in (conclusion(report), noise_conclusion(report)))
    claims = headline(report)
    sentences = [f"- established: {markdown_text(sentence)}" for sentence in claims.established]
    sentences += [f"- not established: {markdown_text(sentence)}" for sentence in claims.open]
    parts = [f"**{verdict}**", "\n".join(sentences), *tables, noise, "\n".join(left_out), footer]
    text = "\n\n".join(part for part in parts if part)
    return text if len(text) <= MAX_TAG else text[:MAX_TAG] + "\n\n... cut here; the page has it all"
