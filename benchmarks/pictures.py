"""The pictures of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

OURS, REFERENCE = "accumexp", "hand-written"
COLOURS = {
    "accumexp": "#d62728",
    "hand-written": "#222222",
    "hand-written fused": "#7f7f7f",
    "single-batch": "#bcbd22",
    "dataloader": "#17becf",
    "accelerate": "#1f77b4",
    "fabric": "#2ca02c",
    "lightning": "#9467bd",
    "transformers": "#ff7f0e",
}


def window_picture(report: dict[str, Any], path: Path) -> None:
    """A row a model: ratios over steps for each micro-batch, and the time of a window over its steps."""
    cells = report["cells"]
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    micros = sorted({cell["micro_batch"] for cell in cells})
    figure, grid = plt.subplots(
        len(models),
        len(micros) + 1,
        figsize=(3.0 * (len(micros) + 1), 2.8 * len(models)),
        squeeze=False,
        layout="constrained",
    )
    drawn: dict[str, Any] = {}
    for row, model in zip(grid, models, strict=True):
        cells_of = [cell for cell in cells if cell["model"] == model]
        for axes, micro in zip(row, micros, strict=False):
            these = [cell for cell in cells_of if cell["micro_batch"] == micro]
            for name in dict.fromkeys(name for cell in these for name in cell["loops"]):
                there = [cell for cell in these if name in cell["loops"]]
                ratios = [cell["loops"][name]["ratio"] for cell in there]
                (line,) = axes.plot([c["steps"] for c in there], ratios, **_style(name))
                drawn[name] = line
            axes.axhline(1.02, color="#d62728", linewidth=0.8, linestyle=":")
            _steps_axis(axes, [cell["steps"] for cell in cells_of])
            axes.set_title(f"{model}, micro-batch {micro}", fontsize=9)
            axes.set_ylabel("time / hand-written", fontsize=8)
        for name, dashes in ((OURS, "-"), (REFERENCE, "--")):
            for micro in micros:
                there = sorted(
                    (cell["steps"], cell["loops"][name]["median_ms"])
                    for cell in cells_of
                    if cell["micro_batch"] == micro and name in cell["loops"]
                )
                if there:
                    row[-1].plot(
                        *zip(*there, strict=True), dashes, marker="o", markersize=3, color=COLOURS[name]
                    )
                    through_one(row[-1], there)
        row[-1].set_yscale("log")
        _steps_axis(row[-1], [cell["steps"] for cell in cells_of])
        row[-1].set_title(f"{model}: a window, line through t(1)", fontsize=9)
        row[-1].set_ylabel("ms", fontsize=8)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def through_one(axes: Axes, points: list[tuple[float, float]]) -> None:
    """Draws the line of a cost proportional to x, through the first of `points`."""
    (x, y), (last, _) = points[0], points[-1]
    axes.plot([x, last], [y, y * last / x], color="#aaaaaa", linewidth=0.8, zorder=0)


def growth_picture(report: dict[str, Any], path: Path) -> None:
    """How cost grows: a panel for each of steps, parameters, ranks and points that was measured."""
    draws = {"steps": _by_steps, "parameters": _by_parameters, "ranks": _by_ranks, "points": _by_points}
    there = [panel for panel in draws if report.get(panel)]
    across = min(2, len(there))
    down = -(-len(there) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(5 * across, 3.75 * down), squeeze=False, layout="constrained"
    )
    for axes, panel in zip(grid.flat, there, strict=False):
        draws[panel](axes, report[panel])
    for axes in grid.flat[len(there) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _by_steps(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for name in (REFERENCE, OURS):
        there = [(row["steps"], row["loops"][name]["median_ms"]) for row in rows]
        axes.plot(*zip(*there, strict=True), **_style(name), label=name)
        through_one(axes, there)
    axes.set_yscale("log")
    axes.set_ylabel("ms a window")
    _steps_axis(axes, [row["steps"] for row in rows])
    axes.set_title("steps, micro-batch fixed; line through t(1)")
    axes.legend(fontsize=8)


def _by_parameters(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for name in (REFERENCE, OURS):
        there = [(row["parameters"], row["loops"][name]["median_ms"]) for row in rows]
        axes.plot(*zip(*there, strict=True), **_style(name), label=name)
    for row in rows:
        ours = row["loops"][OURS]
        place = (row["parameters"], ours["median_ms"])
        axes.annotate(f"{ours['ratio']:.3f}", place, fontsize=7, ha="right", va="bottom")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("ms a window")
    axes.set_title("parameters of an MLP")
    axes.legend(fontsize=8)


def _by_ranks(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(row["loop"] for row in rows):
        points = [(row["ranks"], row["median_ms"]) for row in rows if row["loop"] == name]
        axes.plot(*zip(*points, strict=True), **_style(name), label=name)
    axes.set_xticks(sorted({row["ranks"] for row in rows}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ranks on this machine")
    axes.set_ylabel("ms a window")
    axes.set_title("ranks, samples a rank fixed")
    axes.legend(fontsize=8)


def _by_points(axes: Axes, rows: list[dict[str, Any]]) -> None:
    axes.plot([row["points"] for row in rows], [row["ms_a_point"] for row in rows], **_style(OURS))
    axes.axhline(0.15, color="#d62728", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("points logged to MLflow (SQLite)")
    axes.set_ylabel("ms a point")
    axes.set_title("logged points; at most 0.15 ms")


def memory_picture(report: dict[str, Any], path: Path) -> None:
    """A panel a model: peak of tensors over steps for each loop, and the prediction."""
    models = list(dict.fromkeys(row["model"] for row in report["rows"]))
    figure, grid = plt.subplots(
        1, len(models), figsize=(5 * len(models), 4), squeeze=False, layout="constrained"
    )
    for axes, model in zip(grid[0], models, strict=True):
        rows = [row for row in report["rows"] if row["model"] == model]
        for name in dict.fromkeys(row["loop"] for row in rows):
            points = [(row["steps"], row["peak_mib"]) for row in rows if row["loop"] == name]
            axes.plot(*zip(*points, strict=True), **_style(name), label=name)
        predicted = sorted({(row["steps"], row["predicted_mib"]) for row in rows})
        axes.plot(*zip(*predicted, strict=True), "k:", label="predicted")
        axes.set_yscale("log")
        _steps_axis(axes, [row["steps"] for row in rows])
        axes.set_ylabel("MiB of tensors at the peak")
        axes.set_title(f"{model}, {report['settings']['batch']} samples an update")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _style(name: str) -> dict[str, Any]:
    ours = name == OURS
    return {
        "color": COLOURS.get(name, "#8c564b"),
        "linewidth": 2.0 if ours else 1.0,
        "zorder": 3 if ours else 2,
        "marker": "o",
        "markersize": 4 if ours else 3,
    }


def _steps_axis(axes: Axes, steps: list[int]) -> None:
    axes.set_xscale("log", base=2)
    every = sorted(set(steps))
    axes.set_xticks(every, [str(step) for step in every])
    axes.set_xlabel("steps", fontsize=8)
    axes.tick_params(labelsize=8)
