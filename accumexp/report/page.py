"""The report as one HTML page: pictures inside, nothing loaded, no script."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from .. import __version__
from .analysis import Report, Row
from .certificates import distinct
from .explanations import explanations
from .groups import Group
from .tables import COST_COLUMNS, accuracy_cells, accuracy_columns, cost_cells
from .wording import conclusion, noise_conclusion, outcome, verdict_word

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem }
h2 { font-size: 1.15rem; margin-top: 2.2rem }
p, li { max-width: 46rem; overflow-wrap: break-word }
.small { color: #555; font-size: .88rem }
.verdict { border-left: .4rem solid; padding: .6rem 1rem; background: #f6f6f6; font-size: 1.05rem }
.verdict.equivalent { border-color: #0072B2 }
.verdict.different { border-color: #D55E00 }
.verdict.undecided { border-color: #6E6E6E }
td.equivalent { color: #0072B2; font-weight: 600 }
td.different { color: #B84A00; font-weight: 600 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0 }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap }
th { border-bottom: 2px solid #888; font-weight: 600 }
td:last-child, th:last-child { text-align: left }
.keys1 td:nth-child(-n+1), .keys2 td:nth-child(-n+2), .keys3 td:nth-child(-n+3) { text-align: left }
.wide { overflow-x: auto }
img { max-width: 100%; height: auto }
code { background: #f2f2f2; padding: 0 .2rem }
pre { background: #f2f2f2; padding: .6rem; overflow-x: auto; font-size: .85rem }
@media print {
  body { margin: 0; max-width: none }
  h2 { break-after: avoid }
  img, table { break-inside: avoid }
}
"""

ALTERNATIVES = {
    "accuracy": "Test value of every run and each group, and differences to the reference beside the margin",
    "loss": "Training loss of all groups, and its difference to the reference on a log scale",
    "cost": "Time an update, speed, activation memory and peak memory of each group",
    "noise": "Gradient noise scale over the training, beside the batch sizes",
}


def page(report: Report, pictures: Mapping[str, Path]) -> str:
    """The whole page."""
    sweep, rows = report.sweep, report.rows
    verdict = report.verdict.value if report.verdict else "undecided"
    parts = [
        f"<h1>{escape(sweep.name)}</h1>",
        f'<p class="small">{escape(_about(report))}</p>',
        f'<p class="verdict {verdict}">{escape(conclusion(report))}</p>',
    ]
    if sweep.command:
        parts.append(f"<pre>{escape(sweep.command)}</pre>")
    if rows:
        cells = [accuracy_cells(report, row) for row in rows]
        parts += ["<h2>Is it equivalent?</h2>", _table(accuracy_columns(report), cells, rows)]
        parts += [_certificates(report), _image(pictures, "accuracy")]
        parts.append(_each(report, lambda row: _because(report, row)))
    if "loss" in pictures:
        parts += ["<h2>Is it the same training?</h2>", _image(pictures, "loss"), _each(report, _path)]
    if rows:
        costs = [[*row.group.values.values(), *cost_cells(row.group, row.reference)] for row in rows]
        columns = [*rows[0].group.values, *COST_COLUMNS]
        parts += ["<h2>What it costs, and what it buys</h2>", _table(columns, costs, rows)]
        parts.append(_image(pictures, "cost"))
    answer = noise_conclusion(report)
    if answer:
        parts.append(f"<h2>Should you accumulate at all?</h2><p>{escape(answer)}</p>")
        parts.append(_image(pictures, "noise"))
    if sweep.unfinished:
        parts += ["<h2>Jobs that are not in the figures</h2>", _unfinished(report)]
    parts += ["<h2>How to read this</h2>", _list(explanations(report))]
    if rows:
        parts.append(_configuration(rows[0].group))
    body = "\n".join(part for part in parts if part)
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(sweep.name)}: {verdict}</title><style>{STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _about(report: Report) -> str:
    sweep = report.sweep
    done = f"{len(sweep.finished)} of {len(sweep.jobs)} jobs finished"
    if sweep.status == "RUNNING":
        done += ", the sweep is still running"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(sweep.started)) if sweep.started else ""
    seconds = f"{sweep.seconds:,.0f} s from first to last" if sweep.seconds else ""
    tags = next((job.tags for job in sweep.finished if job.tags), {})
    device = tags.get("accumexp.device", "")
    torch = f"torch {tags['accumexp.torch']}" if "accumexp.torch" in tags else ""
    code = f"code {tags['accumexp.git_sha'][:10]}" if "accumexp.git_sha" in tags else ""
    made = f"accumexp {__version__}"
    return " · ".join(part for part in (done, when, seconds, device, torch, code, made) if part)


def _because(report: Report, row: Row) -> str:
    assert row.comparison is not None
    return f"{verdict_word(row)}, {outcome(row.comparison, report)}"


def _path(row: Row) -> str:
    assert row.comparison is not None
    return row.comparison.trajectory.words


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]], rows: Sequence[Row]) -> str:
    keys = len(rows[0].group.values)
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = []
    for values in cells:
        line = "".join(f"<td{_class(value)}>{escape(value)}</td>" for value in values)
        lines.append(f"<tr>{line}</tr>")
    return f'<div class="wide"><table class="keys{keys}"><tr>{head}</tr>{"".join(lines)}</table></div>'


def _image(pictures: Mapping[str, Path], name: str) -> str:
    if name not in pictures:
        return ""
    content = base64.b64encode(pictures[name].read_bytes()).decode()
    return f'<img alt="{escape(ALTERNATIVES[name])}" src="data:image/png;base64,{content}">'


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>" if lines else ""


def _certificates(report: Report) -> str:
    """Every certificate as it was written: the table has room for its beginning."""
    lines = [
        f"certificate of {escape(', '.join(groups))}: <b>{escape(line)}</b>"
        for line, groups in distinct(report).items()
    ]
    return f'<div class="small">{_list(lines)}</div>' if lines else ""


def _each(report: Report, words: Callable[[Row], str]) -> str:
    return _list([f"<b>{escape(row.group.label)}</b>: {escape(words(row))}." for row in report.comparisons])


def _class(value: str) -> str:
    return f' class="{value}"' if value in ("equivalent", "different") else ""


def _unfinished(report: Report) -> str:
    lines = []
    for job in report.sweep.unfinished:
        reason = f", {escape(job.error)}" if job.error else ""
        lines.append(f"<code>{escape(job.overrides_text)}</code>: {escape(job.status)}{reason}")
    return _list(lines)


def _configuration(group: Group) -> str:
    params = "\n".join(f"{key}: {value}" for key, value in sorted(group.first.params.items()))
    if not params:
        return ""
    title = f"Configuration of {escape(group.label)}, seed {group.first.seed}"
    return f"<details><summary>{title}</summary><pre>{escape(params)}</pre></details>"
