"""Which jobs a report groups, and which group it compares with which."""

from __future__ import annotations

from accumexp.report.groups import group_jobs, reference_groups, varied_keys, varied_params
from accumexp.report.jobs import best_attempts, infer_overrides, parse_overrides
from accumexp.report.wording import conclusion

from ..support.past_sweeps import Job, job, reported, sweep


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


def test_strategies_are_compared_with_the_larger_batch_itself() -> None:
    jobs = [
        job(f"accum={accum}", f"accum.steps={steps}", accum__processes=2 if accum == "ddp" else 1)
        for accum in ("standalone", "ddp")
        for steps in (1, 2)
    ]
    first = "accum=standalone accum.steps=1"
    assert chosen(*jobs) == [None, first, first, first]


def test_jobs_of_unknown_overrides_are_told_apart_by_their_params() -> None:
    jobs = [job(f"accum.steps={k}", f"seed={s}", model__name="mlp") for k in (1, 2) for s in (0, 1, 2)]
    bare = [Job(**{**vars(one), "overrides": {}}) for one in jobs]
    assert [one.overrides for one in infer_overrides(bare)] == [one.overrides for one in jobs]
    assert len(best_attempts(infer_overrides(bare))) == 6
