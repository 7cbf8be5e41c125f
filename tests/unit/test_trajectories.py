"""How a report tells rounding from another training, by the losses of two runs."""

from __future__ import annotations

import numpy as np
import pytest

from accumexp.report.analysis import thin
from accumexp.report.statistics import Verdict
from accumexp.report.trajectory import common_departure, departure
from accumexp.report.wording import conclusion, reason

from ..support.past_sweeps import Job, half_rate, job, like, over_steps, reported, rounding, sweep

EPSILON, BOUND = 2.0**-23, 128 * 2.0**-23


def test_smooth_growth_of_rounding_is_no_departure() -> None:
    assert departure(1e-7 * 4.0 ** np.arange(14), BOUND, EPSILON) == (None, 4)
    assert departure([1e-7] * 6 + [1e-6, 9e-6, 6e-5], BOUND, EPSILON) == (None, 8)
    assert departure([0.0] * 30, BOUND, EPSILON) == (None, 30)
    assert departure([], BOUND, EPSILON) == (None, 0)


def test_a_small_difference_is_a_departure_where_rounding_has_had_no_time_to_grow() -> None:
    assert departure([1e-7, 1.6e-5, 3e-5], BOUND, EPSILON) == (2, 1)
    assert departure([1e-7, 8e-6, 1.6e-5], BOUND, EPSILON) == (3, 2)
    assert departure([1e-7, 1e-7, 1e-7, 1e-7, 1e-6, 1.6e-5], BOUND, EPSILON) == (None, 5)


@pytest.mark.parametrize("where", [0, 1, 11])
def test_a_jump_beyond_rounding_is_a_departure_wherever_it_comes(where: int) -> None:
    assert departure([1e-7] * where + [1e-3] + [2e-3] * 5, BOUND, EPSILON) == (where + 1, where)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([2, 2, 3], 2),
        ([2], 2),
        ([None, 1, 2], 2),
        ([2, None, None], None),
        ([13, 13, 12, 14, None], 13),
        ([12, 55, None], None),
        ([12, 55, 80], None),
        ([55], None),
        ([55, None], None),
        ([55, 56], 56),
        ([], None),
    ],
)
def test_most_pairs_leave_together_or_none_is_said_to(ends: list[int | None], expected: int | None) -> None:
    assert common_departure(ends) == expected


def test_a_jump_within_rounding_is_no_departure() -> None:
    assert departure([1e-9, 1e-5, 1e-5], 1e-4, 1e-12) == (None, 3)


def test_equal_accuracy_of_the_same_training_is_equivalent() -> None:
    report = reported(over_steps(like, loss=rounding), margin=1.0)
    assert report.verdict is Verdict.equivalent
    assert [comparison.trajectory.description for comparison in report.comparisons] == [
        "rounding only, up to update 30"
    ] * 2
    assert conclusion(report) == (
        "accum.steps=2 and 4 are equivalent to accum.steps=1: test accuracy within 1 point."
    )


def test_equal_accuracy_of_another_training_is_different_and_says_where_it_leaves() -> None:
    report = reported(over_steps(like, loss=half_rate), margin=1.0)
    assert [comparison.decision.verdict for comparison in report.comparisons] == [Verdict.equivalent] * 2
    assert report.verdict is Verdict.different
    for comparison in report.comparisons:
        assert comparison.trajectory.departs_at == 2
        assert "its loss leaves the reference's at update 2 by 5.0e-03" in reason(comparison, report)


def test_one_seed_that_parts_does_not_condemn_the_others() -> None:
    base = over_steps(like, loss=rounding)
    bad = [other for other in base.jobs if other.overrides == {"accum.steps": "2", "seed": "3"}]
    wrong = job("accum.steps=2", "seed=3", final=bad[0].final, losses=[half_rate(2, u) for u in range(1, 31)])
    report = reported(sweep(*[wrong if other is bad[0] else other for other in base.jobs]), margin=1.0)
    assert report.verdict is Verdict.equivalent


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"accum__loss_scale": "dynamic", "precision": "fp16"}, "precision"),
        ({"data__batch_size": 256}, "batch size"),
        (
            {"tags": {"accumexp.unequal": "bn1 (BatchNorm2d): statistics; bn2 ..."}},
            "bn1 (BatchNorm2d): statistics",
        ),
    ],
)
def test_a_training_that_is_declared_another_is_judged_by_accuracy_alone(changed: dict, why: str) -> None:
    finals = [{"accuracy": 0.97 + 0.0001 * seed} for seed in range(4)]
    losses = (
        [half_rate(1, update) for update in range(1, 31)],
        [half_rate(2, update) for update in range(1, 31)],
    )
    jobs = [job("accum.steps=1", f"seed={s}", final=finals[s], losses=losses[0]) for s in range(4)]
    jobs += [
        job("accum.steps=2", f"seed={s}", final=finals[3 - s], losses=losses[1], **changed) for s in range(4)
    ]
    report = reported(sweep(*jobs))
    (comparison,) = report.comparisons
    assert comparison.trajectory.declared == [why]
    assert comparison.trajectory.same is None
    assert report.verdict is Verdict.equivalent


def test_a_loss_that_falls_to_nothing_does_not_leave_the_reference() -> None:
    """Near 0 a loss is all rounding: 1e-9 beside 0 is no other training."""

    def vanishing(steps: int, update: int) -> float:
        return 2.0 if update < 5 else (0.0 if steps == 1 else 1e-9)

    assert reported(over_steps(like, loss=vanishing), margin=1.0).verdict is Verdict.equivalent


def test_one_update_is_not_judged() -> None:
    jobs = [job(f"accum.steps={k}", "seed=0", final={"accuracy": 0.9}, losses=[2.0]) for k in (1, 2)]
    (comparison,) = reported(sweep(*jobs)).comparisons
    assert comparison.trajectory.same is None


def test_points_with_gaps_or_in_too_few_bits_are_not_judged() -> None:
    report = reported(over_steps(like))
    words = {comparison.trajectory.description for comparison in report.comparisons}
    assert words == {"not known: the losses of the first updates were not recorded"}
    jobs = [
        job("seed=0", f"accum.steps={k}", losses=[half_rate(k, u) for u in (1, 2, 3)], precision="bf16")
        for k in (1, 2)
    ]
    jobs = [Job(**{**vars(one), "final": {"accuracy": 0.9}}) for one in jobs]
    assert reported(sweep(*jobs)).comparisons[0].trajectory.same is None


def test_a_key_that_varies_is_declared_and_its_accuracy_judged_alone() -> None:
    jobs = [
        job(
            *(f"optimizer.lr={rate}", f"seed={seed}"),
            final={"accuracy": 0.9 + 0.001 * ((seed + (rate == 0.1)) % 3)},
            losses=[2.0 / (1 + rate * update) for update in range(20)],
        )
        for rate in (0.1, 0.2)
        for seed in range(5)
    ]
    report = reported(sweep(*jobs), margin=1.0)
    (comparison,) = report.comparisons
    assert comparison.trajectory.declared == ["optimizer.lr"]
    assert comparison.trajectory.departs_at is None and "optimizer.lr" in comparison.trajectory.description
    assert report.verdict is Verdict.equivalent


def test_a_rate_that_follows_the_steps_unsaid_is_another_training() -> None:
    jobs = [
        job(
            *(f"accum.steps={k}", f"seed={s}"),
            final={"accuracy": 0.9 + 0.001 * ((s + k) % 3)},
            losses=[2.0 / (1 + 0.0003 / k * update) for update in range(20)],
        )
        for k in (1, 2)
        for s in range(5)
    ]
    assert reported(sweep(*jobs), margin=1.0).verdict is Verdict.different


def test_a_long_curve_is_thinned_but_for_what_it_is_judged_by() -> None:
    curve = [(update, 1.0 / update) for update in range(1, 50_001)]
    kept = thin(curve)
    assert [update for update, _ in kept][:101] == [*range(1, 101), 200]
    assert len(kept) < 2200 and thin(kept[:50]) == kept[:50]
