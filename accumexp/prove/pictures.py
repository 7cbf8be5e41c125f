"""The pictures of a certificate: errors by update against their bounds, and how often micro-batches count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..proof import Certificate, Counts, Series
from ..report.style import DPI, STYLE

WIDTH = 5.2  # inches: on a telephone's screen the labels can still be read
RIGHT, WRONG, BOUND = "#0072B2", "#D55E00", "#000000"
# How far from 1 a count is drawn as wrong.
COUNT_TOLERANCE = 1e-3
# The most panels of a picture, the most bars with their value, and the most bars: more are lines, which are
# drawn faster.
MAX_PANELS = 12
MAX_LABELLED = 16
MAX_BARS = 128
PANEL, ZERO_PANEL = 2.6, 1.5  # heights in inches; of a series without a difference the smaller one
EMPTY_RANGE = (1e-17, 1.0)  # of an axis where every figure and bound is 0


def draw(certificate: Certificate, paths: Mapping[str, Path]) -> dict[str, Path]:
    """Writes the pictures that `certificate` has data for; returns their files by name.

    Args:
        paths: the PNG files of "errors" and "counts". Files without data are removed.
    """
    # Those that fail come first, because a picture has not more than MAX_PANELS.
    series = sorted(filter(lambda one: one.updates, certificate.series), key=lambda one: not one.failing)
    counts = [one for one in certificate.counts if any(one.counts)]
    written = {}
    with matplotlib.rc_context(STYLE):
        for name, figure in (("errors", errors_figure(series)), ("counts", counts_figure(counts))):
            paths[name].unlink(missing_ok=True)
            if figure is not None:
                figure.savefig(paths[name], dpi=1.5 * DPI, metadata={"Software": "accumexp"})
                written[name] = paths[name]
    return written


def errors_figure(series: Sequence[Series]) -> Figure | None:
    """Every series by update and its bound, on a log axis; None without a series."""
    if not series:
        return None
    series = series[:MAX_PANELS]
    figure, panels = _panels([ZERO_PANEL if _is_zero(one) else PANEL for one in series])
    for axes, one in zip(panels, series, strict=True):
        _draw_series(axes, one)
    return figure


def _is_zero(series: Series) -> bool:
    return not any(series.figures) and not any(series.bounds)


def _draw_series(axes: Axes, series: Series) -> None:
    low, high = _value_range(series)
    failing = set(series.failing)
    points: dict[str, list[tuple[int, float]]] = {"within": [], "zero": [], "failing": []}
    for update, figure in zip(series.updates, series.figures, strict=True):
        kind = "failing" if update in failing else "within" if figure else "zero"
        points[kind].append((update, min(max(figure, low), high) if math.isfinite(figure) else high))
    bounds = [max(bound, low) if math.isfinite(bound) else math.nan for bound in series.bounds]
    few = {"marker": "_", "ms": 9} if len(bounds) == 1 else {}
    axes.plot(series.updates, bounds, "-", color=BOUND, lw=1.2, label="bound", **few)
    size = 4 if len(bounds) <= 40 else 2.5
    styles = {
        "within": {"marker": "o", "color": RIGHT, "ms": size, "label": "found"},
        "zero": {"marker": "o", "color": RIGHT, "ms": size, "mfc": "white", "label": "no difference"},
        "failing": {"marker": "X", "color": WRONG, "ms": size + 2, "mec": "white", "mew": 0.5,
                    "label": f"above the bound in {len(failing)} of {len(bounds)}"},
    }  # fmt: skip
    for kind, style in styles.items():
        if points[kind]:
            axes.plot(*zip(*points[kind], strict=True), ls="", clip_on=False, **style)
    axes.set(yscale="log", ylim=(low / 2, high * 2), ylabel=series.unit, xlabel="update")
    axes.minorticks_off()  # they take most of the time
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if len(bounds) == 1:
        axes.set_xlim(series.updates[0] - 1, series.updates[0] + 1)
    if _is_zero(series):
        axes.set_yticks([low], ["0"])
    axes.set_title(series.name, loc="left", pad=20)
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3, "borderpad": 0}
    axes.legend(fontsize=8, ncols=3, handlelength=1.2, **place)


def _value_range(series: Series) -> tuple[float, float]:
    """The range of the axis: of all positive figures and bounds, with a place for 0 and one for infinity."""
    positive = [value for value in [*series.figures, *series.bounds] if math.isfinite(value) and value > 0]
    if not positive:
        return EMPTY_RANGE
    return max(min(positive) / 10, 1e-300), min(max(positive) * 10, 1e300)


def counts_figure(counts: Sequence[Counts]) -> Figure | None:
    """A bar for each micro-batch, rank after rank, beside the line at 1; None without counts."""
    if not counts:
        return None
    counts = counts[:MAX_PANELS]
    figure, panels = _panels([PANEL] * len(counts))
    for axes, one in zip(panels, counts, strict=True):
        _draw_counts(axes, one)
    return figure


def _draw_counts(axes: Axes, counts: Counts) -> None:
    values = [value if math.isfinite(value) else math.nan for rank in counts.counts for value in rank]
    numbers = [number for rank in counts.counts for number in range(len(rank))]
    positions = range(len(values))
    colours = [RIGHT if abs(value - 1) <= COUNT_TOLERANCE else WRONG for value in values]
    heights = [0.0 if math.isnan(value) else value for value in values]
    if len(values) <= MAX_BARS:
        bars = axes.bar(positions, heights, color=colours, width=0.7)
        if len(values) <= MAX_LABELLED:
            labels = ["?" if math.isnan(value) else f"{value + 0.0:.3g}" for value in values]
            axes.bar_label(bars, labels, fontsize=8, padding=2)
    else:
        axes.vlines(positions, 0, heights, colours)
    axes.axhline(1, color=BOUND, lw=1.2)
    axes.axhline(0, color="#888888", lw=0.6)
    every = math.ceil(len(values) / MAX_LABELLED)
    ticks = [position for position in positions if numbers[position] % every == 0]
    axes.set_xticks(ticks, [str(numbers[position]) for position in ticks])
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="micro-batch", ylabel="counts", xlim=(-0.6, len(values) - 0.4))
    axes.set_ylim(1.2 * min([0.0, *heights]), 1.2 * max([1.0, *heights]))
    axes.set_title(counts.where, loc="left")
    if len(counts.counts) > 1:
        start = 0
        for rank, row in enumerate(counts.counts):
            if start:
                axes.axvline(start - 0.5, color="#888888", lw=0.8, ls=":")
            middle = start + (len(row) - 1) / 2
            place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "top", "fontsize": 8}
            axes.annotate(f"rank {rank}", (middle, 1.0), **place)
            start += len(row)
        axes.set_ylim(top=1.15 * axes.get_ylim()[1])


def _panels(heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure with axes one below the other, of `heights` in inches."""
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    return figure, list(figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
