"""Up to which batch a larger one is worth it, by the gradient noise scale that the runs have measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .groups import Group
from .jobs import Curve

NOISE = "train/noise_scale"


@dataclass(frozen=True)
class NoiseScale:
    """The gradient noise scale of one group, in samples, as medians over its jobs.

    Attributes:
        early, late: over the first and the last third of the points.
        points: (samples seen, noise scale), the median over the jobs.
    """

    group: Group
    early: float
    late: float
    points: list[tuple[int, float]]


def noise_scales(groups: Sequence[Group]) -> list[NoiseScale]:
    """Of the groups whose jobs have measured it."""
    found = []
    for group in groups:
        curves = [curve for job in group.jobs.values() if len(curve := job.curve(NOISE)) >= 3]
        if not curves:
            continue
        early = [_middle(curve[: len(curve) // 3]) for curve in curves]
        late = [_middle(curve[-(len(curve) // 3) :]) for curve in curves]
        by_update: dict[int, list[float]] = {}
        for curve in curves:
            for update, value in curve:
                by_update.setdefault(update, []).append(value)
        points = [
            (round(update * group.samples_an_update), statistics.median(values))
            for update, values in sorted(by_update.items())
            if 2 * len(values) > len(curves)
        ]
        found.append(NoiseScale(group, statistics.median(early), statistics.median(late), points))
    return found


def _middle(points: Curve) -> float:
    return statistics.median(value for _, value in points)


def worth(scales: Sequence[NoiseScale]) -> float:
    """The batch up to which a larger one is worth it: the median of the groups' late noise scales (samples).

    At that batch a run needs twice the fewest samples and twice the fewest updates.
    """
    return statistics.median(scale.late for scale in scales)
