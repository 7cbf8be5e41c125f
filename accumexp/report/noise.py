"""The gradient noise scale that the runs measured, and the critical batch size that follows from it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .groups import Group

NOISE_SCALE = "train/noise_scale"


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
    """The noise scales of the groups whose jobs measured at least three points."""
    scales = []
    for group in groups:
        curves = [curve for job in group.jobs.values() if len(curve := job.curve(NOISE_SCALE)) >= 3]
        if not curves:
            continue
        scale = [[value for _, value in curve] for curve in curves]
        early = statistics.median(statistics.median(values[: len(values) // 3]) for values in scale)
        late = statistics.median(statistics.median(values[-(len(values) // 3) :]) for values in scale)
        by_update: dict[int, list[float]] = {}
        for curve in curves:
            for update, value in curve:
                by_update.setdefault(update, []).append(value)
        points = [
            (round(update * group.samples_per_update), statistics.median(values))
            for update, values in sorted(by_update.items())
            if 2 * len(values) > len(curves)
        ]
        scales.append(NoiseScale(group, early, late, points))
    return scales


def critical_batch_size(scales: Sequence[NoiseScale]) -> float:
    """The median of the groups' late noise scales, in samples.

    A run with this batch size needs twice the fewest samples and twice the fewest updates (McCandlish et al.
    2018, arXiv:1812.06162).
    """
    return statistics.median(scale.late for scale in scales)
