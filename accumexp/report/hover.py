"""What a pointer over a picture shows: texts for parts of it, laid over the PNG as titles of an SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 1000.0  # of a picture, in the units of its areas
POINT = 9.0  # half the side of a point's area
MAX_AREAS = 60  # of a curve


@dataclass(frozen=True)
class Area:
    """A rectangle of a picture, from its upper left corner, with its text."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Picture:
    """A PNG file. A picture is `WIDTH` wide and `height` high in the units of its areas."""

    path: Path
    height: float
    areas: list[Area]


class HoverFigure(Figure):
    """A figure that keeps the texts for its parts until it has been drawn, when their places are known."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._texts: list[tuple[Axes, tuple[float, float], float | None, str]] = []

    def add_column(self, axes: Axes, left: float, right: float, text: str) -> None:
        """Shows `text` over the whole height of `axes` between two x."""
        self._texts.append((axes, (left, right), None, text))

    def add_point(self, axes: Axes, x: float, y: float, text: str) -> None:
        self._texts.append((axes, (x, x), y, text))

    def write(self, path: Path, dpi: int) -> Picture:
        self.savefig(path, dpi=dpi, metadata={"Software": "accumexp"})
        width, height = self.get_size_inches()
        height = WIDTH * height / width
        areas = [self._area(*entry, height) for entry in self._texts]
        return Picture(path, height, [area for area in areas if area])

    def _area(
        self, axes: Axes, sides: tuple[float, float], y: float | None, text: str, height: float
    ) -> Area | None:
        """The area in the picture; None outside of the axes."""
        to_figure = axes.transData + self.transFigure.inverted()
        frame = axes.get_position()
        middle = frame.y0 if y is None else to_figure.transform((sides[0], y))[1]
        left, right = (float(to_figure.transform((x, axes.get_ylim()[0]))[0]) for x in sides)
        left, right = max(left, frame.x0), min(right, frame.x1)
        if not all(map(math.isfinite, (left, right, middle))) or right < left:
            return None
        if y is None:
            top = (1 - frame.y1) * height
            return Area(WIDTH * left, top, WIDTH * (right - left), frame.height * height, text)
        if not frame.y0 <= middle <= frame.y1:
            return None
        return Area(WIDTH * left - POINT, (1 - middle) * height - POINT, 2 * POINT, 2 * POINT, text)


def label_curves(
    figure: HoverFigure, axes: Axes, name: str, curves: Mapping[str, Mapping[float, str]]
) -> None:
    """Shows the texts of all curves at an x in the column around it, `name` standing for the x.

    Args:
        curves: label to the text at each x.
    """
    every = sorted({x for texts in curves.values() for x in texts})
    chosen = _spread(every, axes.get_xscale() == "log")
    middles = [(left + right) / 2 for left, right in zip(chosen, chosen[1:], strict=False)]
    edges = [-math.inf, *middles, math.inf]
    low, high = axes.get_xlim()
    for x, left, right in zip(chosen, edges[:-1], edges[1:], strict=bool(chosen)):
        lines = [f"{label}: {texts[x]}" for label, texts in curves.items() if x in texts]
        text = "\n".join([f"{name} {x:,.0f}", *lines])
        figure.add_column(axes, max(left, low), min(right, high), text)


def range_texts(x: np.ndarray, middle: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[float, str]:
    """At each x, the value and, over several seeds, its range."""
    return {
        float(at): f"{value:.3g}" + (f" ({least:.3g} to {most:.3g})" if most > least else "")
        for at, value, least, most in zip(x, middle, low, high, strict=True)
    }


def _spread(values: Sequence[float], log: bool) -> list[float]:
    """At most `MAX_AREAS` of the sorted `values`, evenly spread on the axis."""
    if len(values) <= MAX_AREAS:
        return list(values)
    space = np.geomspace if log else np.linspace
    places = np.searchsorted(values, space(values[0], values[-1], MAX_AREAS) * (1 - 1e-12))
    return [values[index] for index in sorted(set(places.tolist()))]
