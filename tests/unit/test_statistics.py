"""The report's statistics, against statsmodels, closed forms and simulated sweeps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from accumexp.report.statistics import (
    Verdict,
    compare_pairs,
    decide,
    equivalence_power,
    holm,
    seeds_needed,
    summarize,
)


def test_the_paired_equivalence_test_is_that_of_statsmodels() -> None:
    from statsmodels.stats.weightstats import DescrStatsW, ttost_paired

    generator = np.random.default_rng(0)
    for _ in range(200):
        count = int(generator.integers(2, 30))
        reference = generator.normal(96, 1, count)
        candidate = reference + generator.normal(0.2, 0.6, count)
        margin = float(generator.uniform(0.1, 2))
        comparison = compare_pairs(candidate - reference, margin)
        expected, *_ = ttost_paired(candidate, reference, -margin, margin)
        assert comparison.p_equivalent == pytest.approx(expected, abs=1e-9)
        described = DescrStatsW(candidate - reference)
        assert comparison.p_different == pytest.approx(described.ttest_mean(0)[1], abs=1e-9)
        low, high = described.tconfint_mean(0.05)
        assert (comparison.low, comparison.high) == pytest.approx((low, high), abs=1e-9)
        assert (comparison.mean, comparison.std) == pytest.approx(
            (described.mean, np.std(candidate - reference, ddof=1))
        )


def test_a_groups_interval_is_that_of_statsmodels() -> None:
    from statsmodels.stats.weightstats import DescrStatsW

    values = np.random.default_rng(1).normal(97, 0.5, 7)
    summary = summarize(list(values), confidence=0.9)
    described = DescrStatsW(values)
    assert (summary.low, summary.high) == pytest.approx(described.tconfint_mean(0.1), abs=1e-9)
    assert (summary.count, summary.mean, summary.std) == pytest.approx((7, values.mean(), values.std(ddof=1)))
    alone = summarize([97.0])
    assert alone.mean == 97 and math.isnan(alone.std) and math.isnan(alone.low)


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_the_correction_for_many_comparisons_is_that_of_statsmodels(count: int) -> None:
    from statsmodels.stats.multitest import multipletests

    p_values = np.random.default_rng(count).uniform(0, 0.2, count)
    assert holm(list(p_values)) == pytest.approx(multipletests(p_values, method="holm")[1], abs=1e-12)
    ties = [0.01] * count
    assert holm(ties) == pytest.approx(multipletests(ties, method="holm")[1], abs=1e-12)


def test_at_the_margin_a_sweep_is_falsely_equivalent_no_more_often_than_promised() -> None:
    """2,000 sweeps of a reference and three groups, each truly different by just the margin, five seeds."""
    generator = np.random.default_rng(2)
    margin, sweeps, false = 0.5, 2000, 0
    for _ in range(sweeps):
        reference = generator.normal(97, 0.3, 5)
        groups = 97 + margin + generator.normal(0, 0.3, (3, 5))
        judged = decide([compare_pairs(group - reference, margin) for group in groups])
        false += any(one.verdict is Verdict.equivalent for one in judged)
    assert false / sweeps <= 0.065
    assert false > 0  # a test that never finds anything equivalent would pass, too


def test_equal_groups_are_falsely_different_no_more_often_than_promised() -> None:
    generator = np.random.default_rng(3)
    false = 0
    for _ in range(1000):
        groups = generator.normal(97, 1.0, (4, 5))
        judged = decide([compare_pairs(group - groups[0], 0.5) for group in groups[1:]])
        false += any(one.verdict is Verdict.different for one in judged)
    assert 0 < false / 1000 <= 0.071  # 5 % and three standard errors


@pytest.mark.parametrize("true", [0.0, 0.2])
def test_the_power_is_that_of_simulated_sweeps(true: float) -> None:
    generator = np.random.default_rng(4)
    pairs, std, margin = 12, 0.6, 0.6
    draws = generator.normal(true, std, (1500, pairs))
    power = np.mean([compare_pairs(row, margin).p_equivalent < 0.05 for row in draws])
    assert equivalence_power(pairs, std, margin, 0.05, true) == pytest.approx(power, abs=0.04)


def test_the_seeds_needed_are_the_fewest_that_have_the_power() -> None:
    needed = seeds_needed(1.0, 0.5)
    assert needed is not None
    assert equivalence_power(needed, 1.0, 0.5, 0.05) >= 0.8 > equivalence_power(needed - 1, 1.0, 0.5, 0.05)
    assert seeds_needed(1.0, 2.0) < needed  # type: ignore[operator]
    assert seeds_needed(1.0, 0.5, alpha=0.01) > needed  # type: ignore[operator]
    assert seeds_needed(100.0, 0.5) is None


def verdict(differences: list[float], margin: float = 0.5) -> Verdict:
    return decide([compare_pairs(differences, margin)])[0].verdict


def test_there_are_three_verdicts() -> None:
    assert verdict([0.1, -0.1, 0.05, -0.02, 0.0]) is Verdict.equivalent
    assert (
        verdict([0.21, 0.19, 0.2, 0.22, 0.18]) is Verdict.equivalent
    )  # a real difference, inside the margin
    assert verdict([-3.0, -2.8, -3.3, -2.9, -3.1]) is Verdict.different
    assert verdict([-2.0, 2.0, 1.5, -1.0, 0.3]) is Verdict.undecided


def test_one_pair_or_none_decides_nothing() -> None:
    assert verdict([]) is Verdict.undecided
    assert verdict([0.0]) is Verdict.undecided
    assert verdict([-40.0]) is Verdict.undecided


def test_a_run_that_diverged_leaves_nothing_to_test_and_the_others_their_verdicts() -> None:
    lost = compare_pairs([0.1, float("nan"), 0.2], 0.5)
    good = compare_pairs([0.1, -0.1, 0.05, -0.02, 0.0], 0.5)
    assert [one.verdict for one in decide([lost, good, lost])] == [
        Verdict.undecided,
        Verdict.equivalent,
        Verdict.undecided,
    ]


def test_pairs_without_spread_count_by_the_smallest_step_or_as_signs() -> None:
    assert verdict([0.0] * 4) is Verdict.undecided  # by signs: 1 in 16
    assert verdict([0.0] * 5) is Verdict.equivalent
    assert verdict([0.5] * 6) is Verdict.different
    for count, step, expected in (
        (2, 0.01, Verdict.equivalent),
        (3, 0.28, Verdict.equivalent),
        (3, 1.0, Verdict.undecided),
        (2, 0.28, Verdict.undecided),
    ):
        assert decide([compare_pairs([0.0] * count, 0.5, resolution=step)])[0].verdict is expected


def test_accuracies_of_few_samples_are_falsely_equivalent_no_more_often_than_promised() -> None:
    """Counts of 360 test samples agree by chance; the true difference is the margin."""
    generator = np.random.default_rng(5)
    sweeps, samples, margin, false = 2000, 360, 1.0, 0
    for _ in range(sweeps):
        reference = 100 * generator.binomial(samples, 0.98, 3) / samples
        candidate = 100 * generator.binomial(samples, 0.97, 3) / samples
        comparison = compare_pairs(candidate - reference, margin, resolution=100 / samples)
        false += decide([comparison])[0].verdict is Verdict.equivalent
    assert 0 < false / sweeps <= 0.065


def test_without_a_margin_nothing_is_equivalent() -> None:
    assert compare_pairs([0.0] * 9, None).p_equivalent == 1.0
    assert compare_pairs([0.01, -0.01, 0.0, 0.02], None).p_equivalent == 1.0


def test_many_comparisons_need_more_evidence_than_one() -> None:
    border = [0.3, -0.2, 0.33, 0.1, -0.2, 0.3]
    alone = compare_pairs(border, 0.4)
    assert 0.0125 < alone.p_equivalent < 0.05
    assert decide([alone])[0].verdict is Verdict.equivalent
    crowd = [compare_pairs([1.0, -1.0, 0.5, 2.0, -0.7, -1.2], 0.4)] * 3
    assert decide([alone, *crowd])[0].verdict is Verdict.undecided
