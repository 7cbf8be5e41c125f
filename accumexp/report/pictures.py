"""The pictures of a report: legible in print and without colour, each with its units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .analysis import Report, Row, costs
from .noise import worth
from .statistics import Verdict
from .trajectory import epsilon_of
from .wording import verdict_word

# Okabe and Ito's colours, told apart with every colour vision (jfly.uni-koeln.de/color).
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A00"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (3, 1)), (0, (1, 1)), (0, (6, 2))]
VERDICT_COLOURS = {
    Verdict.equivalent: "#0072B2",
    Verdict.different: "#D55E00",
    Verdict.undecided: "#6E6E6E",
}
MANY = 8  # groups, beyond which labels are turned, pictures grow and legends shrink
TOO_MANY = 20  # groups, beyond which a legend would hide the curves
LONGEST = 24  # characters of a group's name on an axis or in a legend
RESOLUTION = 110  # dots an inch: sharp on a page, small in a mail
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw(report: Report, folder: Path) -> dict[str, Path]:
    """Writes the pictures that `report` has the data for; name and path of each."""
    import matplotlib

    painters: dict[str, Callable[[Report], Figure | None]] = {
        "accuracy": accuracy,
        "loss": losses,
        "cost": cost,
        "noise": noise,
    }
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, paint in painters.items():
            figure = paint(report)
            if figure is not None:
                drawn[name] = folder / f"{name}.png"
                figure.savefig(drawn[name], dpi=RESOLUTION, metadata={"Software": "accumexp"})
    return drawn


def accuracy(report: Report) -> Figure | None:
    """Every run and each group's mean with its interval; beside it the differences and the margin's band."""
    rows = report.rows
    if not rows:
        return None
    measure, margin = report.measure, report.margin
    compared = bool(report.comparisons)
    wide = (9.4 if compared else 5.2) * max(1.0, len(rows) / (2 * MANY))
    figure = Figure(figsize=(wide, 3.9), layout="constrained")
    axes = figure.subplots(1, 2 if compared else 1, squeeze=False)[0]
    left = axes[0]
    places = np.arange(len(rows))
    for place, row in zip(places, rows, strict=True):
        values = [measure.factor * value for value in row.group.finals(measure.key)]
        spots = place - 0.22 + np.linspace(-0.08, 0.08, len(values)) if len(values) > 1 else [place - 0.22]
        left.plot(spots, values, "o", ms=4, mfc="none", mec="#777777", label="_")
        half = row.value.high - row.value.mean
        left.errorbar(
            place, row.value.mean, yerr=None if math.isnan(half) else half,
            color=_colour(row), marker=MARKERS[0], ms=7, capsize=5, lw=2,
        )  # fmt: skip
    left.set_ylabel(measure.name)
    percent = f"{report.config.confidence:.0%}"
    left.set_title(f"each run (circles), mean and {percent} interval", fontsize=10)
    if measure.unit:
        low, high = left.get_ylim()
        left.set_ylim(max(low, -0.5), min(high, 100.5))  # a fraction's interval may reach beyond it
    _groups_axis(left, rows, report)
    if not compared:
        return figure
    right = axes[1]
    title = f"{percent} interval"
    if margin is not None:
        title += f", and the margin of ±{measure.amount(margin)}"
        right.axhspan(-margin, margin, color="#0072B2", alpha=0.12, lw=0)
        for side in (-margin, margin):
            right.axhline(side, color="#0072B2", lw=1, ls="--")
    right.axhline(0, color="#444444", lw=1)
    for place, row in zip(places, rows, strict=True):
        if row.comparison is None:
            right.plot(place, 0, marker="o", ms=7, color="#000000")
            continue
        found = row.comparison.difference
        half = found.high - found.mean
        right.errorbar(
            place, found.mean, yerr=None if math.isnan(half) else half,
            color=_colour(row), marker="o", ms=7, capsize=5, lw=2,
        )  # fmt: skip
    _verdicts(right, rows)
    unit = f" ({measure.unit})" if measure.unit else ""
    right.set_ylabel(f"difference to the reference{unit}")
    right.set_title(title, fontsize=10)
    _groups_axis(right, rows, report)
    return figure


def losses(report: Report) -> Figure | None:
    """The loss of all groups over each other, and how far each is from its reference, on a log scale."""
    rows = [row for row in report.rows if any(report.curves[id(row.group)].values())]
    if not rows:
        return None
    compared = [row for row in rows if row.comparison and row.comparison.trajectory.updates.size]
    figure = Figure(figsize=(9.4 if compared else 5.6, 4.0), layout="constrained")
    axes = figure.subplots(1, 2 if compared else 1, squeeze=False)[0]
    left = axes[0]
    by_samples = len({row.group.batch_size for row in rows}) > 1
    for index, row in enumerate(report.rows):
        curves = [curve for curve in report.curves[id(row.group)].values() if curve]
        if not curves:
            continue
        updates, middle, low, high = _band(curves)
        x = updates * row.group.samples_an_update if by_samples else updates
        left.plot(x, middle, label=_cut(row.group.label, 2 * LONGEST), **_line(index))
        if len(curves) > 1:
            left.fill_between(x, low, high, color=_line(index)["color"], alpha=0.12, lw=0)
    if all(
        value > 0 for row in rows for curve in report.curves[id(row.group)].values() for _, value in curve
    ):
        left.set_yscale("log")
    left.set_xlabel("samples seen" if by_samples else "update")
    left.set_ylabel("training loss of the window")
    left.set_title("median and range over the seeds", fontsize=10)
    _legend(left, len(rows))
    if not compared:
        return figure
    right = axes[1]
    smallest = min(epsilon_of(row.group) for row in compared) / 4
    for index, row in enumerate(report.rows):
        if row not in compared or row.comparison is None:
            continue
        path = row.comparison.trajectory
        style = _line(index)
        right.plot(
            path.updates, np.maximum(path.median, smallest), label=_cut(row.group.label, 2 * LONGEST), **style
        )
        right.fill_between(
            path.updates, np.maximum(path.low, smallest), np.maximum(path.high, smallest),
            color=style["color"], alpha=0.12, lw=0,
        )  # fmt: skip
        if path.leaves is not None:
            right.plot(path.leaves, path.by, marker="X", ms=10, color=style["color"])
            right.annotate(
                f"leaves at update {path.leaves}", (path.leaves, path.by), (9, -3),
                textcoords="offset points", fontsize=8, color=style["color"],
            )  # fmt: skip
    bound = max(row.comparison.trajectory.bound for row in compared if row.comparison)
    right.axhspan(smallest / 2, bound, color="#777777", alpha=0.13, lw=0)
    right.annotate(
        "what rounding explains", (0.98, bound), (0, -10), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", fontsize=8, color="#555555",
    )  # fmt: skip
    right.set_yscale("log")
    right.set_xscale("log")
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.set_ylim(bottom=smallest / 2)
    right.set_xlabel("update")
    right.set_ylabel("|loss - reference's| / largest so far")
    right.set_title("rounding grows smoothly; a bug jumps", fontsize=10)
    _legend(right, len(compared), loc="upper left")
    return figure


def cost(report: Report) -> Figure | None:
    """What accumulation buys and what it costs, group by group: medians over the jobs, each from zero."""
    rows = [row for row in report.rows if costs(row.group).update_ms is not None]
    if not rows:
        return None
    found = [costs(row.group) for row in rows]
    panels = [
        ("time an update", "ms", [one.update_ms for one in found]),
        ("speed", "samples/s", [one.samples_per_second for one in found]),
        ("activations saved for backward", "MiB", [one.activation_mib for one in found]),
        ("peak memory", _where(rows), [one.peak_mib for one in found]),
    ]
    panels = [panel for panel in panels if all(value is not None for value in panel[2])]
    wide = 2.45 * len(panels) * max(1.0, len(rows) / MANY)
    figure = Figure(figsize=(wide, 3.2), layout="constrained")
    for axes, (title, unit, values) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        numbers = [value for value in values if value is not None]
        bars = axes.bar(range(len(rows)), numbers, color="#56B4E9", edgecolor="#1f4e66", width=0.65)
        axes.bar_label(bars, [_short(value) for value in numbers], fontsize=8, padding=2)
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(unit)
        axes.margins(y=0.12)
        axes.grid(axis="x", visible=False)
        _groups_axis(axes, rows, report)
    return figure


def noise(report: Report) -> Figure | None:
    """The gradient noise scale over the training, beside the batches that were tried."""
    if not report.noise:
        return None
    figure = Figure(figsize=(5.6, 3.9), layout="constrained")
    axes = figure.subplots()
    sizes = sorted({row.group.batch_size for row in report.rows})
    for size in sizes:
        axes.axhline(size, color="#b0b0b0", lw=0.8)
        axes.annotate(
            f"batch {size}", (1.0, size), (-2, 2), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", fontsize=7, color="#666666",
        )  # fmt: skip
    for index, scale in enumerate(report.noise):
        x, y = zip(*scale.points, strict=True)
        axes.plot(x, y, label=_cut(scale.group.label, 2 * LONGEST), **_line(index))
    limit = worth(report.noise)
    axes.axhline(limit, color="#E69F00", lw=3.5, alpha=0.8)
    axes.annotate(
        f"worth it up to here: {limit:.0f}", (0.0, limit), (3, 4), xycoords=("axes fraction", "data"),
        textcoords="offset points", fontsize=8,
    )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("samples seen")
    axes.set_ylabel("gradient noise scale (samples)")
    axes.set_title("batches below the noise scale are worth enlarging", fontsize=10)
    _legend(axes, len(report.noise))
    return figure


def _groups_axis(axes: Axes, rows: Sequence[Row], report: Report) -> None:
    labels = ["\n".join(_cut(value) for value in row.group.values.values()) for row in rows]
    axes.set_xticks(range(len(rows)), labels)
    axes.set_xlabel(_cut(", ".join(rows[0].group.values), 2 * LONGEST))
    axes.set_xlim(-0.6, len(rows) - 0.4)
    if len(rows) > MANY or max(map(len, labels)) > LONGEST:
        axes.tick_params(axis="x", rotation=60, labelsize=7)


def _legend(axes: Axes, groups: int, **where: Any) -> None:
    if groups <= TOO_MANY:
        axes.legend(fontsize=8 if groups <= MANY else 6, **where)


def _cut(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _verdicts(axes: Axes, rows: Sequence[Row]) -> None:
    """Each group's verdict above its place."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.12 * (high - low))
    for place, row in enumerate(rows):
        axes.annotate(
            verdict_word(row), (place, 0.95), xycoords=("data", "axes fraction"), ha="center", fontsize=9,
            color=_colour(row), rotation=0 if len(rows) <= MANY else 60,
        )  # fmt: skip


def _colour(row: Row) -> str:
    return "#000000" if row.comparison is None else VERDICT_COLOURS[row.comparison.verdict]


def _line(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "ls": DASHES[(index + index // len(DASHES)) % len(DASHES)],
        "lw": 1.5,
    }


def _band(
    curves: Sequence[Sequence[tuple[int, float]]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(updates, median, lowest, highest) over the curves' common points."""
    common = sorted(set.intersection(*[{update for update, _ in curve} for curve in curves]))
    values = [dict(curve) for curve in curves]
    table = np.array([[value[update] for update in common] for value in values])
    return np.array(common), np.median(table, axis=0), table.min(axis=0), table.max(axis=0)


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _where(rows: Sequence[Row]) -> str:
    device = rows[0].group.first.tags.get("accumexp.device", "")
    return "MiB, of the process" if "cores" in device or not device else "MiB, on the device"
