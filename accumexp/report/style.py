"""The style of pictures: legible in print and without colour."""

from __future__ import annotations

from typing import Any

# The palette of Okabe and Ito, distinguishable with all kinds of colour vision (jfly.uni-koeln.de/color).
COLOURS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A00"]
DPI = 110
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
