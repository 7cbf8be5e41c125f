"""The statistics of a sweep: paired differences, equivalence, and how many seeds would settle it.

Nothing here knows of runs: values go in, one number a seed, and numbers come out. scipy computes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from scipy import stats

MOST_SEEDS = 10_000


class Verdict(Enum):
    """What a comparison has shown. `undecided` is no weak form of either: the data do not tell."""

    equivalent = "equivalent"
    different = "different"
    undecided = "undecided"


@dataclass(frozen=True)
class Summary:
    """One group's values: their number, mean, standard deviation and the interval of the mean.

    `std`, `low` and `high` are nan for a single value.
    """

    count: int
    mean: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A group against its reference, paired by seed, in the unit of the values.

    Attributes:
        pairs: seeds that both have.
        mean, std: of the paired differences (group minus reference).
        low, high: the confidence interval of the mean difference; nan for a single pair.
        p_different: two-sided paired t-test of "there is no difference".
        p_equivalent: two one-sided paired t-tests of "the difference is the margin or more".
    """

    pairs: int
    mean: float
    std: float
    low: float
    high: float
    p_different: float
    p_equivalent: float


@dataclass(frozen=True)
class Judgement:
    """The verdict on one difference, with p-values corrected for the number of comparisons."""

    verdict: Verdict
    p_different: float
    p_equivalent: float


def summary(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """Mean, standard deviation (n - 1) and Student's t interval of the mean."""
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if array.size < 2:
        return Summary(array.size, mean, math.nan, math.nan, math.nan)
    std = float(array.std(ddof=1))
    low, high = _interval(mean, std, array.size, confidence)
    return Summary(array.size, mean, std, low, high)


def difference(
    differences: Sequence[float] | np.ndarray,
    margin: float | None,
    confidence: float = 0.95,
    resolution: float = 0.0,
) -> Difference:
    """Interval, difference test and equivalence test of paired differences.

    The equivalence test is Schuirmann's (1987, doi:10.1007/BF01068419): two one-sided t-tests, of which the
    larger p-value counts, that of the nearer side of the margin. A value that is not finite, of a run that
    diverged, leaves nothing to test. Pairs that all differ by exactly the same have no spread to test with:
    one step of `resolution` is taken for it, and without one the p-values are those of a sign test.

    Args:
        differences: group minus reference, one number a seed.
        margin: the largest difference that does not matter, above 0; None if nobody has said.
        resolution: the smallest step of a value, for an accuracy one sample of the test split.
    """
    array = np.asarray(differences, dtype=float)
    count = array.size
    mean = float(array.mean()) if count else math.nan
    if count < 2 or not np.isfinite(array).all():
        return Difference(count, mean, math.nan, math.nan, math.nan, 1.0, 1.0)
    std = float(array.std(ddof=1))
    low, high = _interval(mean, std, count, confidence)
    spread = std
    if std <= 1e-12 * float(np.abs(array).max()):
        if not resolution:
            sign = 0.5**count
            inside = margin is not None and abs(mean) < margin
            return Difference(count, mean, std, low, high, 2 * sign if mean else 1.0, sign if inside else 1.0)
        spread = resolution
    error = spread / math.sqrt(count)
    p_different = 2 * _p_value(abs(mean) / error, count)
    p_equivalent = 1.0 if margin is None else _p_value((margin - abs(mean)) / error, count)
    return Difference(count, mean, std, low, high, p_different, p_equivalent)


def judge(differences: Sequence[Difference], confidence: float = 0.95) -> list[Judgement]:
    """Verdicts on all comparisons of a sweep, each kind of test corrected by Holm's method.

    Equivalent: the difference is inside the margin, be it zero or not. Different: there is a difference, and
    that it is inside the margin is not shown (Lakens 2017, doi:10.1177/1948550617697177). Undecided: neither.
    """
    alpha = 1 - confidence
    same = holm([one.p_equivalent for one in differences])
    other = holm([one.p_different for one in differences])
    judged = []
    for p_equivalent, p_different in zip(same, other, strict=True):
        verdict = Verdict.undecided
        if p_equivalent < alpha:
            verdict = Verdict.equivalent
        elif p_different < alpha:
            verdict = Verdict.different
        judged.append(Judgement(verdict, p_different, p_equivalent))
    return judged


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that all claims together err with at most the level's chance.

    Holm (1979), Scandinavian Journal of Statistics 6: the k-th smallest of m times m - k + 1, made monotone.
    """
    count = len(p_values)
    corrected = [1.0] * count
    highest = 0.0
    for rank, index in enumerate(sorted(range(count), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (count - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def equivalence_power(pairs: int, std: float, margin: float, alpha: float, true: float = 0.0) -> float:
    """Chance that `pairs` seeds show equivalence if the true difference is `true`.

    By the non-central t distribution (Phillips 1990, doi:10.1007/BF01063556), which is exact but for the
    correlation of the two one-sided tests, and errs to the low side.
    """
    critical = stats.t.ppf(1 - alpha, pairs - 1)
    scale = math.sqrt(pairs) / std
    above = stats.nct.sf(critical, pairs - 1, (margin + true) * scale)
    below = stats.nct.sf(critical, pairs - 1, (margin - true) * scale)
    return max(0.0, float(above + below - 1))


def seeds_needed(std: float, margin: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """The fewest pairs that show equivalence at `power` if there is no difference; None above 10,000.

    Args:
        std: of the paired differences.
        margin: in the same unit.
        alpha: the level of the test; with several comparisons its share of it.
    """
    if not std > 1e-9 * margin:  # which needs no more pairs than a sign test does
        return math.ceil(math.log2(1 / alpha))
    if equivalence_power(MOST_SEEDS, std, margin, alpha) < power:
        return None
    low, high = 1, MOST_SEEDS  # power is too small at low, and large enough at high
    while high - low > 1:
        middle = (low + high) // 2
        if equivalence_power(middle, std, margin, alpha) < power:
            low = middle
        else:
            high = middle
    return high


def _interval(mean: float, std: float, count: int, confidence: float) -> tuple[float, float]:
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * std / math.sqrt(count)
    return mean - half, mean + half


def _p_value(t: float, count: int) -> float:
    """The chance of Student's t of `count` values to be `t` or more."""
    return float(stats.t.sf(t, count - 1))
