"""What a report groups, what it compares with what, and how it tells rounding from a bug."""

from __future__ import annotations

import numpy as np
import pytest

from accumexp.config.overrides import report_from
from accumexp.errors import UsageError
from accumexp.report.analysis import thin
from accumexp.report.groups import group_jobs, reference_groups, varied_keys, varied_params
from accumexp.report.jobs import best_attempts, infer_overrides, parse_overrides
from accumexp.report.statistics import Verdict
from accumexp.report.trajectory import common_departure, departure
from accumexp.report.wording import conclusion, noise_conclusion, reason

from ..support.past_sweeps import Job, job, over_steps, reported, sweep

# Groups ------------------------------------------------------------------------------------------------


def test_jobs_are_grouped_by_all_that_varies_but_the_seed() -> None:
    jobs = [
        job(f"accum.steps={steps}", f"optimizer.lr={rate}", f"seed={seed}", "model=mlp")
        for steps in (2, 1, 10)
        for rate in (0.1, 0.02)
        for seed in (2, 0, 1)
    ]
    groups = group_jobs(jobs)
    assert [tuple(group.values.items()) for group in groups] == [
        (("accum.steps", steps), ("optimizer.lr", rate))
        for steps in ("1", "2", "10")
        for rate in ("0.02", "0.1")
    ]
    assert [list(group.jobs) for group in groups] == [[0, 1, 2]] * 6
    assert groups[0].label == "accum.steps=1 optimizer.lr=0.02"


def test_jobs_that_did_not_finish_are_in_no_group_but_count_for_what_varied() -> None:
    ends = ["FINISHED", "FAILED", "KILLED", "RUNNING"]
    jobs = [job(f"accum.steps={number}", status=status) for number, status in enumerate(ends, 1)]
    assert varied_keys(jobs) == ["accum.steps"]
    assert [
        (group.values["accum.steps"], len(group.jobs), group.unfinished) for group in group_jobs(jobs)
    ] == [
        *(("1", 1, 0), ("2", 0, 1), ("3", 0, 1), ("4", 0, 1)),
    ]
    report = reported(sweep(*[Job(**{**vars(one), "final": {"accuracy": 0.9}}) for one in jobs]))
    assert [row.group.label for row in report.rows] == ["accum.steps=1"]
    assert [group.label for group in report.missing] == [f"accum.steps={number}" for number in (2, 3, 4)]
    text = conclusion(report)
    assert "nothing to compare it with." in text and text.endswith("2, 3 and 4 have no finished job.")


def test_a_sweep_over_seeds_alone_is_one_group_of_its_steps() -> None:
    groups = group_jobs([job("seed=0", accum__steps=4), job("seed=1", accum__steps=4)])
    assert [group.values for group in groups] == [{"accum.steps": "4"}]
    assert reference_groups(groups) == [None]


def test_overrides_keep_equal_signs_in_their_values_and_lose_their_plus() -> None:
    assert parse_overrides(["+tracking.tags.x='a=1'", "~optimizer.momentum"]) == {
        "tracking.tags.x": "'a=1'",
        "~optimizer.momentum": "deleted",
    }


def test_of_several_attempts_at_a_job_the_finished_one_counts() -> None:
    first, second = job("seed=0", status="KILLED"), job("seed=0")
    third = job("seed=0", status="RUNNING")
    assert best_attempts([first, second, third]) == [second]
    assert len(best_attempts([first, job("seed=1")])) == 2


def chosen(*jobs: Job) -> list[str | None]:
    references = reference_groups(group_jobs(jobs))
    return [reference and reference.label for reference in references]


def test_groups_are_compared_with_their_like_of_the_fewest_micro_batches() -> None:
    jobs = [job(f"accum.steps={steps}", f"optimizer.lr={rate}") for steps in (2, 1, 4) for rate in (0.1, 0.2)]
    lower, higher = "accum.steps=1 optimizer.lr=0.1", "accum.steps=1 optimizer.lr=0.2"
    assert chosen(*jobs) == [None, None, lower, higher, lower, higher]


def test_without_one_micro_batch_the_fewest_are_the_reference() -> None:
    assert chosen(job("accum.steps=8"), job("accum.steps=2")) == [None, "accum.steps=2"]


def test_ranks_count_as_micro_batches() -> None:
    jobs = [job("accum=ddp", accum__processes=2), job("accum=standalone")]
    assert chosen(*jobs) == ["accum=standalone", None]


def test_batch_sizes_that_vary_with_the_steps_are_compared_with_the_smallest() -> None:
    jobs = [job(f"data.batch_size={size}", accum__steps=size // 32) for size in (32, 64, 128)]
    assert chosen(*jobs) == [None, "data.batch_size=32", "data.batch_size=32"]


def test_a_config_group_that_varies_is_told_by_the_params_it_changes() -> None:
    groups = group_jobs(
        [
            job("accum=standalone", "accum.steps=2", accum__strategy="standalone"),
            job("accum=ddp", "accum.steps=2", accum__strategy="ddp"),
        ]
    )
    assert varied_params(groups) == ["accum.strategy"]
    assert varied_params(group_jobs([job("accum.steps=1"), job("accum.steps=2")])) == ["accum.steps"]


# Trajectories ------------------------------------------------------------------------------------------

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


def rounding(steps: int, update: int) -> float:
    return 2.0 / update * (1 + 1e-7 * (steps > 1) * (update % 3))


def half_rate(steps: int, update: int) -> float:
    return 2.0 / update * (1 + 0.01 * (steps > 1) * (update > 1))


def like(steps: int, seed: int) -> float:
    return 0.97 + 0.001 * seed + 0.0004 * ((seed * 7 + steps) % 3 - 1)


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


# Verdicts in words -------------------------------------------------------------------------------------


def test_an_undecided_comparison_says_how_many_seeds_would_decide() -> None:
    report = reported(over_steps(lambda k, seed: 0.95 + 0.01 * ((seed * k) % 3), loss=rounding), margin=0.5)
    assert report.verdict is Verdict.undecided
    (first, *_) = report.comparisons
    assert first.seeds_needed and first.seeds_needed > 5
    assert f"about {first.seeds_needed} would" in reason(first, report)


def test_a_lower_accuracy_is_different_and_says_by_how_much() -> None:
    report = reported(over_steps(lambda k, seed: 0.97 - 0.03 * (k > 1) + 0.001 * ((seed * k) % 2)))
    assert report.verdict is Verdict.different
    (first, *_) = report.comparisons
    assert reason(first, report).startswith("lower by ")


def test_pairs_are_of_the_same_seed_and_seeds_of_one_group_alone_do_not_count() -> None:
    jobs = over_steps(lambda k, seed: 0.9 + 0.01 * seed, steps=(1, 2), seeds=6).jobs
    jobs = [one for one in jobs if one.overrides not in ({"accum.steps": "1", "seed": "5"},)]
    (comparison,) = reported(sweep(*jobs)).comparisons
    assert comparison.difference.count == 5
    assert comparison.difference.mean == pytest.approx(0, abs=1e-12)


def test_a_single_group_or_none_is_no_comparison_and_no_error() -> None:
    alone = reported(sweep(job("seed=0", final={"accuracy": 0.9}), job("seed=1", final={"accuracy": 0.8})))
    assert alone.verdict is None and "nothing to compare it with" in conclusion(alone)
    nothing = reported(sweep(job("seed=0", status="FAILED")))
    assert nothing.verdict is None and "No job" in conclusion(nothing)


def test_losses_are_compared_in_their_own_unit_if_there_is_no_accuracy() -> None:
    jobs = [
        job(f"accum.steps={k}", f"seed={s}", final={"loss": 0.3 + 0.01 * s})
        for k in (1, 2)
        for s in (0, 1, 2)
    ]
    report = reported(sweep(*jobs), margin=0.05)
    assert (report.metric.key, report.metric.factor, report.metric.unit) == ("loss", 1.0, "")
    assert report.rows[0].value.mean == pytest.approx(0.31)


def test_without_a_value_of_the_reference_nothing_is_equivalent() -> None:
    """The default margin of a loss is a share of the reference's value, of which 0 has none."""
    jobs = [
        job(f"accum.steps={k}", f"seed={s}", final={"loss": 0.01 * k**2 + 0.0001 * s * k})
        for k in (1, 2)
        for s in range(4)
    ]
    report = reported(sweep(*jobs))
    assert report.margin is None and report.verdict is Verdict.different
    same = reported(
        sweep(*[job(f"accum.steps={k}", f"seed={s}", final={"loss": 0.0}) for k in (1, 2) for s in range(4)])
    )
    (comparison,) = same.comparisons
    assert same.verdict is Verdict.undecided
    assert reason(comparison, same).startswith("report.margin=... is needed")


def test_strategies_are_compared_with_the_larger_batch_itself() -> None:
    jobs = [
        job(f"accum={accum}", f"accum.steps={steps}", accum__processes=2 if accum == "ddp" else 1)
        for accum in ("standalone", "ddp")
        for steps in (1, 2)
    ]
    first = "accum=standalone accum.steps=1"
    assert chosen(*jobs) == [None, first, first, first]


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


def test_a_group_that_is_missing_leaves_the_sweep_undecided() -> None:
    base = over_steps(like, loss=rounding)
    report = reported(sweep(*base.jobs, job("accum.steps=16", "seed=0", status="FAILED")), margin=1.0)
    assert report.verdict is Verdict.undecided
    assert conclusion(report).endswith("accum.steps=16 has no finished job.")


def test_jobs_of_unknown_overrides_are_told_apart_by_their_params() -> None:
    jobs = [job(f"accum.steps={k}", f"seed={s}", model__name="mlp") for k in (1, 2) for s in (0, 1, 2)]
    bare = [Job(**{**vars(one), "overrides": {}}) for one in jobs]
    assert [one.overrides for one in infer_overrides(bare)] == [one.overrides for one in jobs]
    assert len(best_attempts(infer_overrides(bare))) == 6


def test_a_long_curve_is_thinned_but_for_what_it_is_judged_by() -> None:
    curve = [(update, 1.0 / update) for update in range(1, 50_001)]
    kept = thin(curve)
    assert [update for update, _ in kept][:101] == [*range(1, 101), 200]
    assert len(kept) < 2200 and thin(kept[:50]) == kept[:50]


def test_the_margin_is_the_one_the_sweep_was_run_with_unless_another_is_asked_for() -> None:
    params = {"report.margin": "2.0", "report.metric": "None", "report.older": "1", "seed": "0"}
    assert report_from(params, {}).margin == 2.0
    assert report_from(params, {"report.margin": "1"}).margin == 1.0
    assert report_from({}, {}).margin is None
    assert reported(over_steps(like)).margin == 0.5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"report.margins": "1"}, "did you mean report.margin"),
        ({"report.margin": "wide"}, "report.margin=wide"),
        ({"report.margin": "0"}, "report.margin=0.0: above 0"),
        ({"report.confidence": "95"}, "report.confidence=95.0: below 1"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says.replace("(", r"\(")):
        report_from({}, changes)


def test_an_unknown_metric_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match="report.metric=f1: the jobs of this sweep have accuracy, loss"):
        reported(over_steps(like), metric="f1")


# The batch-size question -------------------------------------------------------------------------------


def test_the_noise_scale_says_up_to_which_batch_a_larger_one_is_worth_it() -> None:
    def noisy(size: int, seed: int) -> Job:
        one = job(
            f"data.batch_size={size}",
            f"seed={seed}",
            final={"accuracy": 0.97 - 0.05 * (size > 128), "samples": 9000.0, "test_samples": 1000.0},
            accum__steps=size // 32,
        )
        points = [(update, 40.0 + 10 * update) for update in range(1, 10)]
        return Job(**{**vars(one), "curve": lambda key: points if key == "train/noise_scale" else []})

    report = reported(sweep(*[noisy(size, seed) for size in (32, 128, 512) for seed in range(3)]))
    assert [(scale.early, scale.late) for scale in report.noise] == [(60.0, 120.0)] * 3
    answer = noise_conclusion(report)
    assert answer and "up to about 120 samples" in answer and "32 lies below" in answer
    assert answer.endswith("At equal samples seen, 512 did worse than 32.")
    assert noise_conclusion(reported(over_steps(like))) is None
