"""The pictures of a report: legible in print and without colour, with units on the axes and hover values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from .analysis import Report, Row
from .hover import HoverFigure, Picture, label_curves, range_texts
from .noise import critical_batch_size
from .statistics import Verdict
from .style import COLOURS, DPI, STYLE
from .tables import COST_COLUMNS, cost_table, memory_unit
from .trajectory import precision_epsilon
from .wording import mean_and_std, signed_interval, three_digits

DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)), (0, (6, 2))]
VERDICT_COLOURS = {
    "reference": "#000000",
    Verdict.equivalent.value: "#0072B2",
    Verdict.different.value: "#D55E00",
    Verdict.undecided.value: "#6E6E6E",
}
MANY_GROUPS = 8  # with more, labels are rotated, figures are wider and legends smaller
MAX_LEGEND = 20  # groups; a larger legend would hide the curves
MAX_LABEL = 24  # characters of a group's name on an axis; in a legend twice as many
COLUMNS = {name: heading for heading, name, *_ in COST_COLUMNS}  # of the table of costs, by quantity
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
FRACTION = ("axes fraction", "data")  # coordinates: x from 0 to 1 over the axes, y a value


def draw(report: Report, folder: Path) -> dict[str, Picture]:
    """Writes the pictures that `report` has data for as PNG files; returns them by name."""
    painters = {"accuracy": accuracy_figure, "loss": loss_figure, "cost": cost_figure, "noise": noise_figure}
    pictures = {}
    with matplotlib.rc_context(STYLE):
        for name, paint in painters.items():
            figure = paint(report)
            if figure is not None:
                pictures[name] = figure.write(folder / f"{name}.png", DPI)
    return pictures


def accuracy_figure(report: Report) -> HoverFigure | None:
    """The metric of every run and group; beside it the differences to the references and the margin."""
    if not report.rows:
        return None
    compared = bool(report.comparisons)
    width = (9.4 if compared else 5.2) * max(1.0, len(report.rows) / (2 * MANY_GROUPS))
    figure, (left, *right) = _panels(1 + compared, width, 3.9)
    _draw_values(figure, left, report)
    if right:
        _draw_differences(figure, right[0], report)
    return figure


def _draw_values(figure: HoverFigure, axes: Axes, report: Report) -> None:
    metric = report.metric
    for position, row in enumerate(report.rows):
        values = metric.values(row.group)
        offsets = np.linspace(-0.08, 0.08, len(values)) if len(values) > 1 else np.zeros(1)
        places = position - 0.22 + offsets
        axes.plot(places, list(values.values()), "o", ms=4, mfc="none", mec="#777777", label="_")
        text = f"{row.group.label}: {mean_and_std(row.value, metric)} over {row.value.count} seeds"
        figure.add_column(axes, position - 0.4, position + 0.4, text)
        for place, (seed, value) in zip(places, values.items(), strict=True):
            figure.add_point(axes, place, value, f"{row.group.label}, seed {seed}: {value:.4g}")
        _draw_interval(axes, position, row.value.mean, row.value.high, row)
    axes.set(ylabel=metric.heading)
    axes.set_title(f"each run (circles), mean and {report.config.confidence:.0%} interval")
    if metric.unit:
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.5), min(high, 100.5))  # the interval of a fraction may exceed its range
    _label_groups(axes, report.rows)


def _draw_differences(figure: HoverFigure, axes: Axes, report: Report) -> None:
    rows = report.rows
    title = f"{report.config.confidence:.0%} interval, and the margin of ±{report.margin_text}"
    margins = {comparison.margin for comparison in report.comparisons}
    if len(margins) == 1 and (margin := margins.pop()) is not None:
        axes.axhspan(-margin, margin, color="#0072B2", alpha=0.12, lw=0)
        for side in (-margin, margin):
            axes.axhline(side, color="#0072B2", lw=1, ls="--")
    else:  # each reference has its own
        for position, row in enumerate(rows):
            if row.comparison and row.comparison.margin is not None:
                sides = (-row.comparison.margin, row.comparison.margin)
                axes.hlines(sides, position - 0.4, position + 0.4, color="#0072B2", lw=1, ls="--")
    axes.axhline(0, color="#444444", lw=1)
    for position, row in enumerate(rows):
        if row.comparison is None:
            axes.plot(position, 0, marker="o", ms=7, color="#000000")
        else:
            difference = row.comparison.difference
            _draw_interval(axes, position, difference.mean, difference.high, row)
            text = f"{row.group.label}: {signed_interval(difference, report.metric)}, {row.verdict}"
            figure.add_column(axes, position - 0.4, position + 0.4, text)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.12 * (high - low))  # room for the verdicts
    for position, row in enumerate(rows):
        axes.annotate(
            row.verdict, (position, 0.95), xycoords=("data", "axes fraction"), ha="center", fontsize=9,
            color=VERDICT_COLOURS[row.verdict], rotation=0 if len(rows) <= MANY_GROUPS else 60,
        )  # fmt: skip
    unit = f" ({report.metric.unit})" if report.metric.unit else ""
    axes.set(ylabel=f"difference to the reference{unit}", title=title)
    _label_groups(axes, rows)


def _draw_interval(axes: Axes, position: int, mean: float, high: float, row: Row) -> None:
    error = None if math.isnan(high) else high - mean
    colour = VERDICT_COLOURS[row.verdict]
    axes.errorbar(position, mean, yerr=error, color=colour, marker="o", ms=7, capsize=5, lw=2)


def loss_figure(report: Report) -> HoverFigure | None:
    """The loss of all groups; beside it the relative difference to the reference, on a log scale."""
    if not any(any(report.curves[row.group].values()) for row in report.rows):
        return None
    compared = any(comparison.trajectory.updates.size for comparison in report.comparisons)
    figure, (left, *right) = _panels(1 + compared, 9.4 if compared else 5.6, 4.0)
    _draw_losses(figure, left, report)
    if right:
        _draw_loss_differences(figure, right[0], report)
    return figure


def _draw_losses(figure: HoverFigure, axes: Axes, report: Report) -> None:
    by_samples = len({row.group.batch_size for row in report.rows}) > 1
    positive, texts = True, {}
    for index, row in enumerate(report.rows):
        curves = [dict(curve) for curve in report.curves[row.group].values() if curve]
        if not curves:
            continue
        positive &= all(value > 0 for curve in curves for value in curve.values())
        updates = sorted(set.intersection(*map(set, curves)))
        table = np.array([[curve[update] for update in updates] for curve in curves])
        x = np.array(updates) * (row.group.samples_per_update if by_samples else 1)
        median, low, high = np.median(table, axis=0), table.min(0), table.max(0)
        _draw_band(axes, index, row.group.label, x, median, low, high)
        texts[row.group.label] = range_texts(x, median, low, high)
    if positive:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter(PLAIN)
    axes.set(xlabel="samples seen" if by_samples else "update", ylabel="training loss of the window")
    axes.set_title("median and range over the seeds")
    label_curves(figure, axes, "samples" if by_samples else "update", texts)
    _legend(axes)


def _draw_loss_differences(figure: HoverFigure, axes: Axes, report: Report) -> None:
    compared = {
        index: row.comparison
        for index, row in enumerate(report.rows)
        if row.comparison and row.comparison.trajectory.updates.size
    }
    floor = min(precision_epsilon(comparison.group) for comparison in compared.values()) / 4
    texts = {}
    for index, comparison in compared.items():
        path = comparison.trajectory
        low, median, high = (np.maximum(values, floor) for values in (path.low, path.median, path.high))
        colour = _draw_band(axes, index, comparison.group.label, path.updates, median, low, high)
        texts[comparison.group.label] = range_texts(path.updates, path.median, path.low, path.high)
        if path.departs_at is not None:
            point = (path.departs_at, path.departs_by)
            axes.plot(*point, marker="X", ms=10, color=colour)
            _annotate(axes, f"leaves at update {path.departs_at}", point, (9, -3), color=colour)
    bound = max(comparison.trajectory.bound for comparison in compared.values())
    axes.axhspan(floor / 2, bound, color="#777777", alpha=0.13, lw=0)
    style = {"ha": "right", "color": "#555555"}
    _annotate(axes, "what rounding explains", (0.98, bound), (0, -10), xycoords=FRACTION, **style)
    axes.set(xscale="log", yscale="log", xlabel="update", ylabel="|loss - reference's| / largest so far")
    axes.xaxis.set_major_formatter(PLAIN)
    axes.set_ylim(bottom=floor / 2)
    axes.set_title("rounding grows smoothly; a bug jumps")
    label_curves(figure, axes, "update", texts)
    _legend(axes, loc="upper left")


def cost_figure(report: Report) -> HoverFigure | None:
    """Time, speed and memory of the groups' updates: medians over the jobs, on axes from zero."""
    rows = [row for row in report.rows if row.group.finals("update_ms")]
    if not rows:
        return None
    memory, mib = memory_unit(report)
    headings = {
        "update_ms": ("time an update", "ms", 1.0),
        "samples_per_second": ("speed", "samples/s", 1.0),
        "activation_mib": ("activations saved for backward", memory.strip(), mib),
        "peak_mib": ("peak memory", f"{memory.strip()} of tensors", mib),
    }
    costs = [row.group.costs() for row in rows]
    table = cost_table(report)
    quantities = [name for name in headings if all(cost[name] is not None for cost in costs)]
    width = 2.45 * len(quantities) * max(1.0, len(rows) / MANY_GROUPS)
    figure, panels = _panels(len(quantities), width, 3.2)
    for axes, name in zip(panels, quantities, strict=True):
        title, unit, factor = headings[name]
        values = [(cost[name] or 0.0) / factor for cost in costs]
        bars = axes.bar(range(len(rows)), values, color="#56B4E9", edgecolor="#1f4e66", width=0.65)
        axes.bar_label(bars, list(map(three_digits, values)), fontsize=8, padding=2)
        axes.set(title=title, ylabel=unit)
        axes.margins(y=0.12)
        column = table.columns.index(COLUMNS[name])
        for position, row in enumerate(rows):
            text = f"{row.group.label}: {table.rows[report.rows.index(row)][column]}"
            figure.add_column(axes, position - 0.4, position + 0.4, text)
        axes.grid(axis="x", visible=False)
        _label_groups(axes, rows)
    return figure


def noise_figure(report: Report) -> HoverFigure | None:
    """The gradient noise scale over the training, beside the batch sizes of the sweep."""
    if not report.noise:
        return None
    figure, (axes,) = _panels(1, 5.6, 3.9)
    for size in sorted({row.group.batch_size for row in report.rows}):
        axes.axhline(size, color="#b0b0b0", lw=0.8)
        style = {"ha": "right", "fontsize": 7, "color": "#666666"}
        _annotate(axes, f"batch {size}", (1.0, size), (-2, 2), xycoords=FRACTION, **style)
    texts = {}
    for index, scale in enumerate(report.noise):
        x, y = zip(*scale.points, strict=True)
        texts[scale.group.label] = {samples: f"{value:.3g}" for samples, value in scale.points}
        axes.plot(x, y, label=_shorten(scale.group.label, 2 * MAX_LABEL), **_line_style(index))
    limit = critical_batch_size(report.noise)
    axes.axhline(limit, color="#E69F00", lw=3.5, alpha=0.8)
    _annotate(axes, f"worth it up to here: {limit:.0f}", (0.0, limit), (3, 4), xycoords=FRACTION)
    axes.set(yscale="log", xlabel="samples seen", ylabel="gradient noise scale (samples)")
    axes.set_title("batches below the noise scale are worth enlarging")
    label_curves(figure, axes, "samples", texts)
    _legend(axes)
    return figure


def _panels(count: int, width: float, height: float) -> tuple[HoverFigure, list[Axes]]:
    """A figure of `width` times `height` inches with `count` axes side by side."""
    figure = HoverFigure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _draw_band(
    axes: Axes, index: int, label: str, x: np.ndarray, middle: np.ndarray, low: np.ndarray, high: np.ndarray
) -> str:
    """Draws a line and the range around it in the style of group `index`; returns its colour."""
    style = _line_style(index)
    axes.plot(x, middle, label=_shorten(label, 2 * MAX_LABEL), **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)
    return style["color"]


def _line_style(index: int) -> dict[str, Any]:
    colour, dashes = COLOURS[index % len(COLOURS)], DASHES[(index + index // len(DASHES)) % len(DASHES)]
    return {"color": colour, "ls": dashes, "lw": 1.5}


def _annotate(
    axes: Axes, text: str, point: tuple[float, float], offset: tuple[int, int], **style: Any
) -> None:
    """Writes `text` at an offset, in typographic points, from `point`."""
    axes.annotate(text, point, offset, textcoords="offset points", **{"fontsize": 8, **style})


def _label_groups(axes: Axes, rows: Sequence[Row]) -> None:
    labels = ["\n".join(map(_shorten, row.group.values.values())) for row in rows]
    axes.set_xticks(range(len(rows)), labels)
    axes.set_xlabel(_shorten(", ".join(rows[0].group.values), 2 * MAX_LABEL))
    axes.set_xlim(-0.6, len(rows) - 0.4)
    if len(rows) > MANY_GROUPS or max(map(len, labels)) > MAX_LABEL:
        axes.tick_params(axis="x", rotation=60, labelsize=7)


def _legend(axes: Axes, **options: Any) -> None:
    groups = len(axes.get_legend_handles_labels()[1])
    if groups <= MAX_LEGEND:
        axes.legend(fontsize=8 if groups <= MANY_GROUPS else 6, **options)


def _shorten(text: str, length: int = MAX_LABEL) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
