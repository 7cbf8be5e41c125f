"""The report as tables: in the terminal, as markdown and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from ..environment.console import console
from ..errors import markdown_text
from .analysis import Comparison, Report, Row
from .wording import certificate_cell, mean_and_std, p_value, reason, signed_interval, three_digits

VERDICT_STYLES = {"equivalent": "green", "different": "red", "undecided": "yellow", "reference": "dim"}
# Columns that are left out in a narrow terminal, in this order.
OPTIONAL_COLUMNS = ("p", "training", "certificate", "seeds")
OPTIONAL_COSTS = ("samples/s", "training time", "peak memory")
MIN_KEY_WIDTH = 12  # of a column that identifies the group; longer values are folded
# The beginning of the keys of a loss's terms in `final/*`.
TERM = "loss/"
# Heading, key of `Group.costs`, unit (MiB stands for that of both memory columns), and whether the ratio to
# the reference is shown.
COST_COLUMNS = [
    ("ms/update", "update_ms", "", True),
    ("samples/s", "samples_per_second", "", True),
    ("activations", "activation_mib", " MiB", True),
    ("peak memory", "peak_mib", " MiB", True),
    ("training time", "seconds", " s", False),
]


@dataclass(frozen=True)
class Table:
    """A row of cells per group. The first `keys` columns identify the group.

    Attributes:
        optional: headings of columns that a narrow terminal may leave out, the least important first.
    """

    keys: int
    columns: list[str]
    rows: list[list[str]]
    optional: Sequence[str] = ()

    def markdown(self) -> str:
        lines = [
            "| " + " | ".join(map(markdown_text, self.columns)) + " |",
            "|" + " --- |" * len(self.columns),
        ]
        lines += ["| " + " | ".join(map(markdown_text, row)) + " |" for row in self.rows]
        return "\n".join(lines)


def result_table(report: Report) -> Table:
    """Each group's mean and standard deviation, and its comparison with its reference."""
    certificate, compared = report.certified, bool(report.comparisons)
    columns = [*report.keys, "seeds", report.metric.heading]
    if compared:
        unit = f" ({report.metric.unit})" if report.metric.unit else ""
        columns += [f"difference{unit} [{report.config.confidence:.0%}]", "p", "training"]
    columns += ["certificate"] * certificate + ["verdict"] * compared
    rows = []
    for row in report.rows:
        cells = [*row.group.values.values(), str(row.value.count), mean_and_std(row.value, report.metric)]
        if row.comparison:
            interval = signed_interval(row.comparison.difference, report.metric)
            cells += [interval, p_value(row.comparison.decision.p_equivalent), _training(row.comparison)]
        elif compared:
            cells += ["", "", ""]
        rows.append(cells + [certificate_cell(row.group)] * certificate + [row.verdict] * compared)
    return Table(len(report.keys), columns, rows, OPTIONAL_COLUMNS)


def _training(comparison: Comparison) -> str:
    """The comparison of the losses in a word or two."""
    trajectory = comparison.trajectory
    if trajectory.same is None:
        return "not claimed" if trajectory.declared else "not known"
    return "the same" if trajectory.same else f"leaves at {trajectory.departs_at}"


def cost_table(report: Report) -> Table:
    """The cost of each group's updates; in brackets the ratio to its reference."""
    unit = memory_unit(report)
    rows = [[*row.group.values.values(), *_cost_cells(row, unit)] for row in report.rows]
    headings = [heading for heading, *_ in COST_COLUMNS]
    return Table(len(report.keys), [*report.keys, *headings], rows, OPTIONAL_COSTS)


def terms_table(report: Report) -> Table | None:
    """The mean over seeds of each term of the loss on the test split; None for losses of one term."""
    names = sorted({key for job in report.sweep.finished for key in job.final if key.startswith(TERM)})
    if not names:
        return None
    rows = []
    for row in report.rows:
        values = [row.group.finals(name) for name in names]
        cells = [f"{sum(of_seeds) / len(of_seeds):z.4f}" if of_seeds else "-" for of_seeds in values]
        rows.append([*row.group.values.values(), *cells])
    headings = [f"test {name.replace(TERM, 'loss ', 1)}" for name in names]
    return Table(len(report.keys), [*report.keys, *headings], rows)


def all_tables(report: Report) -> list[Table]:
    """Results, costs, and the terms of the loss if it has several."""
    terms = terms_table(report)
    return [result_table(report), cost_table(report), *([terms] if terms else [])]


def memory_unit(report: Report) -> tuple[str, float]:
    """The unit of the memory columns, so that the largest number is from 1 to 9,999, and its MiB."""
    costs = [cost for row in report.rows for name, cost in row.group.costs().items() if name.endswith("_mib")]
    largest = max((cost for cost in costs if cost is not None), default=1.0)
    if largest < 1:
        return " KiB", 1 / 1024
    return (" MiB", 1.0) if largest < 10_000 else (" GiB", 1024.0)


def _cost_cells(row: Row, memory_unit: tuple[str, float]) -> list[str]:
    costs = row.group.costs()
    reference_costs = row.comparison.reference.costs() if row.comparison else {}
    cells = []
    for _, name, unit, with_ratio in COST_COLUMNS:
        cost, reference_cost = costs[name], reference_costs.get(name)
        ratio = (
            f" (x{cost / reference_cost:.2f})" if with_ratio and cost is not None and reference_cost else ""
        )
        shown_unit, factor = memory_unit if unit == " MiB" else (unit, 1.0)
        cells.append("-" if cost is None else f"{three_digits(cost / factor)}{shown_unit}{ratio}")
    return cells


def terminal_tables(report: Report, width: int | None = None) -> list[RichTable]:
    """The tables for a rich console, each of at most `width` characters.

    A table that is wider is printed without its optional columns, which its caption names. If that is not
    enough, it is divided into several tables with a part of the columns each.
    """
    if not report.rows:
        return []
    return [part for table in all_tables(report) for part in _fitted(table, width)]


def _fitted(table: Table, width: int | None) -> list[RichTable]:
    """The table in one part, or in several that have the columns of the keys each."""
    columns = list(range(table.keys, len(table.columns)))
    if width is None or _fits(table, columns, width):
        return [_rich_table(table, columns, width)]
    left_out: list[str] = []
    for heading in table.optional:
        if heading in table.columns:
            left_out.append(heading)
            columns = [number for number in columns if table.columns[number] != heading]
            if _fits(table, columns, width):
                break
    parts: list[list[int]] = []
    for number in columns:
        if parts and _fits(table, [*parts[-1], number], width):
            parts[-1].append(number)
        else:
            parts.append([number])
    tables = [_rich_table(table, part, width) for part in parts]
    if left_out:
        tables[-1].caption = Text(f"left out in this width: {', '.join(left_out)}")
        tables[-1].caption_justify = "left"
    return tables


def _fits(table: Table, columns: Sequence[int], width: int) -> bool:
    return _width(_rich_table(table, columns, width)) <= width


def _rich_table(table: Table, columns: Sequence[int], width: int | None) -> RichTable:
    """The columns of the keys and those with the numbers `columns`, in a terminal of `width` characters."""
    keys = table.keys
    rich_table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    key_width = None if width is None else max(MIN_KEY_WIDTH, width // 2 // max(keys, 1))
    shown = [*range(keys), *columns]
    for number in shown:
        of_key = number < keys
        # As Text: rich parses brackets in a string as markup.
        rich_table.add_column(
            Text(table.columns[number]),
            justify="left" if of_key else "right",
            overflow="fold",  # the end of a cell is never cut
            max_width=key_width if of_key else None,
        )
    for row in table.rows:
        rich_table.add_row(
            *[Text(row[number], style=VERDICT_STYLES.get(row[number], "")) for number in shown]
        )
    return rich_table


def _width(rich_table: RichTable) -> int:
    """The width at which nothing in the table is cut."""
    return Measurement.get(console, console.options.update(max_width=10_000), rich_table).maximum


def print_tables(rich_tables: Sequence[RichTable]) -> None:
    """Prints the tables; in a file or a pipe at their full width."""
    for rich_table in rich_tables:
        wide = max(console.width, _width(rich_table))
        printer = console if console.is_terminal else Console(file=console.file, width=wide)
        printer.print(rich_table)


def group_rows(report: Report) -> list[dict[str, Any]]:
    """All numbers of the report, one dict per group."""
    rows = []
    for row in report.rows:
        key, comparison = report.metric.key, row.comparison
        values: dict[str, Any] = {
            **row.group.values,
            "seeds": row.value.count,
            **{f"{key}_{name}": getattr(row.value, name) for name in ("mean", "std", "low", "high")},
        }
        if comparison:
            difference, decision = comparison.difference, comparison.decision
            values.update(
                reference=comparison.reference.label,
                pairs=difference.count,
                difference=difference.mean,
                **{f"difference_{name}": getattr(difference, name) for name in ("std", "low", "high")},
                margin=comparison.margin,
                p_different=difference.p_different,
                p_equivalent=difference.p_equivalent,
                p_different_corrected=decision.p_different,
                p_equivalent_corrected=decision.p_equivalent,
                seeds_needed=comparison.seeds_needed,
                same_training=comparison.trajectory.same,
                leaves_at_update=comparison.trajectory.departs_at,
            )
        values["verdict"] = row.verdict
        if comparison:
            values["because"] = reason(comparison, report)
        if report.certified:
            values["certificate"] = certificate_cell(row.group)
        rows.append({**values, **row.group.costs()})
    return rows


def job_rows(report: Report) -> list[dict[str, Any]]:
    """All jobs of the sweep and their final metrics, one dict per job."""
    certificates = any(job.certificate for job in report.sweep.jobs)
    return [
        {
            **job.overrides,
            "seed": job.seed,
            "status": job.status,
            "run_id": job.run_id,
            **{f"final/{key}": value for key, value in job.final.items()},
            **({"certificate": job.certificate} if certificates else {}),
            "error": job.error,
        }
        for job in report.sweep.jobs
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes `rows` with a column per key; missing values, None and nan are empty."""
    columns = list({key: None for row in rows for key in row})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            # nan, which is not equal to itself, would be written as text.
            writer.writerow({key: value if value == value else None for key, value in row.items()})
