"""A plan's picture: memory and time of an update against the micro-batch."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ..report.style import DPI, STYLE
from .points import Frontier

PREDICTED, MEASURED, LIMIT, CHOSEN = "#0072B2", "#000000", "#D55E00", "#009E73"
ROOM = 1.6  # how far above the largest measured point the axis goes, in its units


def draw(frontier: Frontier, path: Path) -> None:
    """Writes the picture of `frontier` to `path`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.4, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        _memory(frontier, left)
        _time(frontier, right)
        figure.suptitle(
            f"{frontier.name}, updates of {frontier.batch_size} samples on {frontier.device}", fontsize=10
        )
        figure.savefig(path, dpi=DPI, metadata={"Software": "accumexp"})


def _memory(frontier: Frontier, axes: Axes) -> None:
    sizes = [point.micro_batch for point in frontier.points]
    measured = [
        (point.micro_batch, point.measured) for point in frontier.points if point.measured is not None
    ]
    unit, name = (2**30, "GiB") if max(p.predicted for p in frontier.points) >= 4 * 2**30 else (2**20, "MiB")
    axes.plot(
        sizes, [p.predicted / unit for p in frontier.points], "--", color=PREDICTED, lw=1.6, label="predicted"
    )
    axes.plot(
        [m for m, _ in measured], [b / unit for _, b in measured], "o", color=MEASURED, ms=5, label="measured"
    )
    tallest = max(p.predicted for p in frontier.points) / unit
    limit = frontier.limit.bytes / unit
    if limit <= ROOM * tallest:
        axes.axhline(limit, color=LIMIT, lw=1.4, label="limit")
        axes.axhspan(limit, max(limit, tallest) * 1.08, color=LIMIT, alpha=0.08, lw=0)
    if frontier.chosen and frontier.chosen.measured is not None:
        axes.plot(
            frontier.chosen.micro_batch, frontier.chosen.measured / unit,
            "o", ms=12, mfc="none", mec=CHOSEN, mew=2, label=f"accum.steps={frontier.chosen.steps}",
        )  # fmt: skip
    axes.set_ylim(0, max(limit if limit <= ROOM * tallest else 0, tallest) * 1.08)
    axes.set_ylabel(f"peak of tensors ({name})")
    _micro_batches(axes, sizes)
    axes.legend(loc="best", fontsize=9)


def _time(frontier: Frontier, axes: Axes) -> None:
    sizes = [point.micro_batch for point in frontier.points]
    timed = [(p.micro_batch, 1e3 * p.seconds) for p in frontier.points if p.seconds is not None]
    axes.plot([m for m, _ in timed], [ms for _, ms in timed], "o-", color=MEASURED, ms=5, lw=1.2)
    if frontier.chosen and frontier.chosen.seconds is not None:
        axes.plot(
            frontier.chosen.micro_batch, 1e3 * frontier.chosen.seconds,
            "o", ms=12, mfc="none", mec=CHOSEN, mew=2,
        )  # fmt: skip
    axes.set_ylim(0, 1.12 * max((ms for _, ms in timed), default=1.0))
    axes.set_ylabel("time of an update (ms, median)")
    _micro_batches(axes, sizes)


def _micro_batches(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
    axes.set_xticks(sorted({size for size in sizes if size & (size - 1) == 0} or set(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    axes.set_xlabel("samples in a micro-batch")
