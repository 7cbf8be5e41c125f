"""The report as tables: in the terminal, as markdown, and as CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .analysis import Cost, Report, Row, costs
from .certificates import certified, has_certificates
from .groups import Group
from .wording import amount, outcome, p_value, signed_interval, spread, verdict_word

VERDICT_STYLES = {"equivalent": "green", "different": "red", "undecided": "yellow", "reference": "dim"}


def accuracy_columns(report: Report) -> list[str]:
    """The headings of `accuracy_cells`."""
    keys = list(report.rows[0].group.values) if report.rows else []
    columns = [*keys, "seeds", report.measure.name]
    if report.comparisons:
        unit = f" ({report.measure.unit})" if report.measure.unit else ""
        columns += [f"difference{unit} [{report.config.confidence:.0%}]", "p", "training", "verdict"]
    if has_certificates(report):
        columns.insert(len(columns) - bool(report.comparisons), "certificate")
    return columns


def accuracy_cells(report: Report, row: Row) -> list[str]:
    """A group's row: what it is, its mean and deviation, and how it compares."""
    cells = [*row.group.values.values(), str(row.value.count), spread(row.value, report.measure)]
    if report.comparisons:
        found = row.comparison
        if found is None:
            cells += ["", "", "", verdict_word(row)]
        else:
            cells += [
                signed_interval(found.difference, report.measure),
                p_value(found.judgement.p_equivalent),
                training(row),
                verdict_word(row),
            ]
    if has_certificates(report):
        cells.insert(len(cells) - bool(report.comparisons), certified(row.group))
    return cells


def training(row: Row) -> str:
    """The trajectory in a word or two."""
    if row.comparison is None:
        return ""
    path = row.comparison.trajectory
    if path.same is None:
        return "not claimed" if path.declared else "not known"
    return "the same" if path.same else f"leaves at {path.leaves}"


COST_COLUMNS = ["ms/update", "samples/s", "activations", "peak memory", "training time"]


def cost_cells(group: Group, reference: Group | None) -> list[str]:
    """What a group paid, with the ratio to its reference."""
    mine = costs(group)
    other = costs(reference) if reference else None

    def cell(key: str, unit: str, digits: int) -> str:
        value = getattr(mine, key)
        base = getattr(other, key) if other else None
        ratio = f" (x{value / base:.2f})" if value is not None and base else ""
        return amount(value, unit, digits) + ratio

    return [
        cell("update_ms", "", 2),
        cell("samples_per_second", "", 0),
        cell("activation_mib", " MiB", 2),
        amount(mine.peak_mib, " MiB", 0),
        amount(mine.seconds, " s", 1),
    ]


# Left out one after the other where a terminal is too narrow, the least missed first.
SPARED = ["p", "training", "certificate", "seeds"]


def terminal(report: Report, width: int | None = None) -> list[Any]:
    """Tables for a rich console: accuracy, then cost.

    Args:
        width: columns there are; what says the verdict is never what is cut. None for as many as it takes.
    """
    if not report.rows:
        return []
    cells = [accuracy_cells(report, row) for row in report.rows]
    spared: list[str] = []
    first = _table(report, accuracy_columns(report), cells, spared)
    for heading in SPARED if width is not None else ():
        if _needed(first) <= (width or 0):
            break
        spared.append(heading)
        first = _table(report, accuracy_columns(report), cells, spared)
    paid = [[*row.group.values.values(), *cost_cells(row.group, row.reference)] for row in report.rows]
    return [first, _table(report, [*report.rows[0].group.values, *COST_COLUMNS], paid)]


def _table(
    report: Report, columns: Sequence[str], rows: Sequence[Sequence[str]], spared: Sequence[str] = ()
) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    keys = len(report.rows[0].group.values)
    kept = [number for number, heading in enumerate(columns) if number < keys or heading not in spared]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number in kept:
        # As Text, because brackets in a value are no markup.
        heading = Text(columns[number])
        table.add_column(heading, justify="left" if number < keys else "right", no_wrap=number >= keys)
    for row in rows:
        table.add_row(*[Text(row[number], style=VERDICT_STYLES.get(row[number], "")) for number in kept])
    return table


def _needed(table: Any) -> int:
    """Columns of a terminal that a table takes if nothing is cut."""
    from rich.measure import Measurement

    from ..environment.console import console

    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def show(tables: Sequence[Any]) -> None:
    """Prints tables, in a file or a pipe as wide as they are."""
    from ..environment.console import console

    width = console.width
    try:
        for table in tables:
            if not console.is_terminal:
                console.width = max(width, _needed(table))  # `print(width=...)` makes nothing wider
            console.print(table)
    finally:
        console.width = width


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def group_rows(report: Report) -> list[dict[str, Any]]:
    """Every number of the report, a dict a group."""
    rows = []
    for row in report.rows:
        values: dict[str, Any] = dict(row.group.values)
        values["seeds"] = row.value.count
        key = report.measure.key
        values.update({f"{key}_mean": row.value.mean, f"{key}_std": row.value.std})
        values.update({f"{key}_low": row.value.low, f"{key}_high": row.value.high})
        found = row.comparison
        if found is not None:
            path = found.trajectory
            values.update(
                reference=found.reference.label,
                pairs=found.difference.pairs,
                difference=found.difference.mean,
                difference_std=found.difference.std,
                difference_low=found.difference.low,
                difference_high=found.difference.high,
                margin=report.margin,
                p_different=found.difference.p_different,
                p_equivalent=found.difference.p_equivalent,
                p_different_corrected=found.judgement.p_different,
                p_equivalent_corrected=found.judgement.p_equivalent,
                seeds_needed=found.seeds_needed,
                same_training=path.same,
                leaves_at_update=path.leaves,
                verdict=found.verdict.value,
                because=outcome(found, report),
            )
        else:
            values["verdict"] = "reference"
        if has_certificates(report):
            values["certificate"] = certified(row.group)
        paid: Cost = costs(row.group)
        values.update(vars(paid))
        rows.append(values)
    return rows


def job_rows(report: Report) -> list[dict[str, Any]]:
    """Every job of the sweep with what it measured, a dict a job."""
    shown = any(job.certificate for job in report.sweep.jobs)
    return [
        {
            **job.overrides,
            "seed": job.seed,
            "status": job.status,
            "run_id": job.run_id,
            **{f"final/{key}": value for key, value in job.final.items()},
            **({"certificate": job.certificate} if shown else {}),
            "error": job.error,
        }
        for job in report.sweep.jobs
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """`rows` with a column for every key that any of them has; what is not known stays empty."""
    columns = list({key: None for row in rows for key in row})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: "" if _unknown(value) else value for key, value in row.items()})
    return path


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
