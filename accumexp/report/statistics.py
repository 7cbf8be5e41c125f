"""The statistics of a sweep: paired differences, equivalence tests and sample-size planning."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from scipy import stats

MAX_SEEDS = 10_000


class Verdict(Enum):
    """The outcome of a comparison. `undecided`: the data show neither equivalence nor a difference."""

    equivalent = "equivalent"
    different = "different"
    undecided = "undecided"


@dataclass(frozen=True)
class MeanEstimate:
    """Number, mean and standard deviation of values, with the confidence interval of the mean.

    `std`, `low` and `high` are nan for fewer than two values, and if a value is not finite.
    """

    count: int
    mean: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(MeanEstimate):
    """The differences of a group to its reference, paired by seed, and their tests.

    Attributes:
        p_different: p-value of the two-sided paired t-test of a zero difference.
        p_equivalent: p-value of the two one-sided paired t-tests of a difference of at least the margin.
    """

    p_different: float
    p_equivalent: float


@dataclass(frozen=True)
class Decision:
    """The verdict on one difference, with p-values corrected for the number of comparisons."""

    verdict: Verdict
    p_different: float
    p_equivalent: float


def summarize(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> MeanEstimate:
    """Mean, standard deviation (n - 1) and Student's t interval of the mean."""
    array = np.asarray(values, dtype=float)
    mean = float(array.mean()) if array.size else math.nan
    if array.size < 2 or not np.isfinite(array).all():
        return MeanEstimate(array.size, mean, math.nan, math.nan, math.nan)
    std = float(array.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, array.size - 1)) * std / math.sqrt(array.size)
    return MeanEstimate(array.size, mean, std, mean - half, mean + half)


def compare_pairs(
    differences: Sequence[float] | np.ndarray,
    margin: float | None,
    confidence: float = 0.95,
    resolution: float = 0.0,
) -> Difference:
    """Confidence interval, difference test and equivalence test of paired differences.

    The equivalence test is Schuirmann's (1987, doi:10.1007/BF01068419): two one-sided t-tests, of which the
    larger p-value counts. With a value that is not finite, all p-values are 1. If all differences are equal,
    the t-tests are undefined: they then use `resolution` as the standard deviation, or, if that is 0, the
    p-values are those of a sign test.

    Args:
        differences: group minus reference, one number per seed.
        margin: the largest difference that does not matter, above 0, or None.
        resolution: the smallest step of a value; for an accuracy, one sample of the test split.
    """
    summary = summarize(differences, confidence)
    count, distance, std = summary.count, abs(summary.mean), summary.std
    p_different = p_equivalent = 1.0
    if not math.isnan(std):
        constant = std <= 1e-12 * float(np.abs(differences).max())
        if constant and not resolution:
            p_different = 2 * 0.5**count if distance else 1.0
            p_equivalent = 0.5**count if margin is not None and distance < margin else 1.0
        else:
            error = (resolution if constant else std) / math.sqrt(count)
            p_different = 2 * float(stats.t.sf(distance / error, count - 1))
            if margin is not None:
                p_equivalent = float(stats.t.sf((margin - distance) / error, count - 1))
    return Difference(**vars(summary), p_different=p_different, p_equivalent=p_equivalent)


def decide(differences: Sequence[Difference], confidence: float = 0.95) -> list[Decision]:
    """Verdicts on all comparisons of a sweep; each kind of test is corrected by Holm's method.

    Equivalent: the difference is shown to be inside the margin, whether it is zero or not. Different: there
    is a difference, and it is not shown to be inside the margin (Lakens 2017, doi:10.1177/1948550617697177).
    Undecided: neither is shown.
    """
    alpha = 1 - confidence
    equivalent = holm([difference.p_equivalent for difference in differences])
    different = holm([difference.p_different for difference in differences])
    decisions = []
    for p_equivalent, p_different in zip(equivalent, different, strict=True):
        unequal = Verdict.different if p_different < alpha else Verdict.undecided
        verdict = Verdict.equivalent if p_equivalent < alpha else unequal
        decisions.append(Decision(verdict, p_different, p_equivalent))
    return decisions


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for multiple comparisons; controls the family-wise error rate.

    Holm (1979), Scandinavian Journal of Statistics 6: the k-th smallest of m times m - k + 1, made monotone.
    """
    array = np.asarray(p_values, dtype=float)
    order = np.argsort(array)
    scaled = array[order] * np.arange(array.size, 0, -1)
    corrected = np.empty_like(array)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return corrected.tolist()


def equivalence_power(pairs: int, std: float, margin: float, alpha: float, true: float = 0.0) -> float:
    """The probability that `pairs` seeds show equivalence if the true difference is `true`.

    By the non-central t distribution (Phillips 1990, doi:10.1007/BF01063556). Exact up to the correlation of
    the two one-sided tests; the approximation is conservative.
    """
    critical = stats.t.ppf(1 - alpha, pairs - 1)
    scale = math.sqrt(pairs) / std
    above = stats.nct.sf(critical, pairs - 1, (margin + true) * scale)
    below = stats.nct.sf(critical, pairs - 1, (margin - true) * scale)
    return max(0.0, float(above + below - 1))


def seeds_needed(std: float, margin: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """The fewest pairs that show equivalence with `power` if there is no difference; None above 10,000.

    Args:
        std, margin: of the paired differences, in one unit.
        alpha: the level of the test; with several comparisons, its share for one of them.
    """
    if not std > 1e-9 * margin:
        return math.ceil(math.log2(1 / alpha))  # what a sign test needs
    pairs = range(2, MAX_SEEDS + 1)
    index = bisect_left(pairs, power, key=lambda count: equivalence_power(count, std, margin, alpha))
    return pairs[index] if index < len(pairs) else None
