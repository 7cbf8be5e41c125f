"""A plan's picture: memory and time of an update against the micro-batch."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ..report.pictures import DPI, STYLE
from .points import Frontier

PREDICTED, MEASURED, LIMIT, CHOSEN = "#0072B2", "#000000", "#D55E00", "#009E73"
ROOM = 1.6  # how far above the largest measured point the axis goes, in its units


def draw(found: Frontier, path: Path) -> None:
    """Writes the picture of `found` to `path`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.4, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        _memory(found, left)
        _time(found, right)
        figure.suptitle(f"{found.name}, updates of {found.batch_size} samples on {found.device}", fontsize=10)
        figure.savefig(path, dpi=DPI, metadata={"Software": "accumexp"})


def _memory(found: Frontier, axes: Axes) -> None:
    sizes = [point.micro_batch for point in found.points]
    tried = [(point.micro_batch, point.measured) for point in found.points if point.measured is not None]
    unit, name = (2**30, "GiB") if max(p.predicted for p in found.points) >= 4 * 2**30 else (2**20, "MiB")
    axes.plot(
        sizes, [p.predicted / unit for p in found.points], "--", color=PREDICTED, lw=1.6, label="predicted"
    )
    axes.plot(
        [m for m, _ in tried], [b / unit for _, b in tried], "o", color=MEASURED, ms=5, label="measured"
    )
    tallest = max(p.predicted for p in found.points) / unit
    limit = found.limit.bytes / unit
    if limit <= ROOM * tallest:
        axes.axhline(limit, color=LIMIT, lw=1.4, label="limit")
        axes.axhspan(limit, max(limit, tallest) * 1.08, color=LIMIT, alpha=0.08, lw=0)
    if found.chosen and found.chosen.measured is not None:
        axes.plot(
            found.chosen.micro_batch, found.chosen.measured / unit,
            "o", ms=12, mfc="none", mec=CHOSEN, mew=2, label=f"accum.steps={found.chosen.steps}",
        )  # fmt: skip
    axes.set_ylim(0, max(limit if limit <= ROOM * tallest else 0, tallest) * 1.08)
    axes.set_ylabel(f"peak of tensors ({name})")
    _micro_batches(axes, sizes)
    axes.legend(loc="best", fontsize=9)


def _time(found: Frontier, axes: Axes) -> None:
    sizes = [point.micro_batch for point in found.points]
    timed = [(p.micro_batch, 1e3 * p.seconds) for p in found.points if p.seconds is not None]
    axes.plot([m for m, _ in timed], [ms for _, ms in timed], "o-", color=MEASURED, ms=5, lw=1.2)
    if found.chosen and found.chosen.seconds is not None:
        axes.plot(
            found.chosen.micro_batch, 1e3 * found.chosen.seconds,
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
