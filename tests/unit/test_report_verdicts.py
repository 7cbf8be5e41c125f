"""The verdicts of a report in words, the settings that they follow, and the batch-size question."""

from __future__ import annotations

import pytest

from accumexp.config.overrides import report_from
from accumexp.errors import UsageError
from accumexp.report.statistics import Verdict
from accumexp.report.wording import conclusion, noise_conclusion, reason

from ..support.past_sweeps import Job, job, like, over_steps, reported, rounding, sweep


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


def test_a_group_that_is_missing_leaves_the_sweep_undecided() -> None:
    base = over_steps(like, loss=rounding)
    report = reported(sweep(*base.jobs, job("accum.steps=16", "seed=0", status="FAILED")), margin=1.0)
    assert report.verdict is Verdict.undecided
    assert conclusion(report).endswith("accum.steps=16 has no finished job.")


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
