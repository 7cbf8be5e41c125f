"""`accum.steps=auto`: the steps that are chosen fit, and what cannot fit is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from accumexp.config.loading import from_hydra, to_plain, with_steps
from accumexp.config.schema import Config
from accumexp.config.sizes import batch_sizes, in_bytes
from accumexp.environment.ranks import RankInfo
from accumexp.errors import UsageError
from accumexp.plan.auto_steps import choose_steps, measure_steps
from accumexp.plan.frontier import measure_frontier
from accumexp.plan.planner import Planner, out_of_memory
from accumexp.plan.points import Limit, Point
from accumexp.plan.trial_run import TrialRun, trial_run

from ..support.command import journal, only_run, record_of, run_command
from ..support.experiments import composed
from ..support.planned import LENET, RESNET

pytestmark = pytest.mark.usefixtures("imports_are_kept_again")


@pytest.mark.slow
def test_what_does_not_fit_is_never_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    whole = TrialRun.whole
    monkeypatch.setattr("accumexp.plan.frontier.TIMED_SECONDS", 0.01)
    monkeypatch.setattr(TrialRun, "whole", lambda self, steps: (tried.append(steps), whole(self, steps))[1])
    with trial_run(composed(*LENET)) as trial:
        limit = round(1.005 * Planner(trial).predicted_peak(4))
    frontier = measure_frontier(composed(*LENET, f"accum.memory_limit={limit}"), 3, lambda stage: None, list)
    assert frontier.chosen and frontier.chosen.steps == 4 and frontier.chosen.micro_batch == 24
    assert [point.steps for point in frontier.points] == [1, 2, 3, 4, 8, 16, 32, 64, 96]
    assert sorted(tried) == [4, 8, 16, 32, 64, 96]
    for point in frontier.points:
        assert point.fits == (point.steps >= 4) == (point.seconds is not None)
        assert point.micro_batch == -(-96 // point.steps)


def test_a_trial_that_does_not_fit_makes_the_micro_batch_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, tried = TrialRun.whole, []

    def patched(self: TrialRun, steps: int) -> Any:
        tried.append(steps)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        measurement = whole(self, steps)
        if len(tried) == 2:
            measurement.update.peak = planner.limit.bytes + 1
        return measurement

    monkeypatch.setattr(TrialRun, "whole", patched)
    with trial_run(composed(*LENET)) as trial:
        planner = Planner(trial)
        planner.limit = Limit(planner.predicted_peak(2), "a test")
        point = planner.choose()
    assert tried[0] == 2 < tried[1] < tried[2] == point.steps and point.fits


def test_a_batch_that_cannot_even_be_gathered_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(self: TrialRun) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrialRun, "feeding", short)
    with pytest.raises(UsageError, match="data.batch_size=96: cpu cannot hold the samples of an update"):
        measure_steps(composed(*LENET), RankInfo())


def test_a_trial_of_one_micro_batch_may_run_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small = TrialRun.small

    def patched(self: TrialRun, micro: int, steps: int) -> Any:
        if steps == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return small(self, micro, steps)

    monkeypatch.setattr(TrialRun, "small", patched)
    with trial_run(composed(*LENET)) as trial:
        planner = Planner(trial)
        assert planner.predicted_peak(1) > planner.predicted_peak(2)


def test_steps_that_another_rank_needs_and_that_do_not_fit_here_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gathered(objects: list[Any], local: Any) -> None:
        objects[:] = [local, (4, None)] if local[0] == 1 else [local, local]

    whole = TrialRun.whole

    def patched(self: TrialRun, steps: int) -> Any:
        if steps == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, steps)

    monkeypatch.setattr("accumexp.plan.auto_steps.dist.all_gather_object", gathered)
    monkeypatch.setattr("accumexp.plan.trial_run.local_first", lambda rank_info: contextlib.nullcontext())
    monkeypatch.setattr(TrialRun, "whole", patched)
    config = composed(*LENET, "accum=ddp", "accum.processes=2")
    with pytest.raises(UsageError, match="4 steps, which another rank needs, do not fit on rank 0: out of"):
        measure_steps(config, RankInfo(0, 2, 0, 2))


def test_recorded_windows_are_given_their_steps() -> None:
    config = composed(*LENET, "trainer.graph=true")
    with pytest.raises(UsageError, match="accum.steps=auto: a recorded window keeps memory"):
        choose_steps(config, RankInfo())


def test_what_a_trial_run_compiled_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[int] = []
    monkeypatch.setattr("torch.compiler.reset", lambda: reset.append(1))
    for overrides in ([], ["trainer.compile=true"]):
        with trial_run(composed(*LENET, *overrides)):
            assert not reset
    assert reset == [1]


def test_an_error_of_the_model_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TrialRun, *arguments: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(TrialRun, "small", broken)
    with pytest.raises(RuntimeError, match="mat1"), trial_run(composed(*LENET)) as trial:
        Planner(trial)
    with pytest.raises(RuntimeError) as lack:
        torch.empty(2**55)
    assert out_of_memory(lack.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["accum.memory_limit=1MiB"], r"accum.steps=auto: an update with one sample .* the limit is 1.0 MiB"),
        (
            ["accum.memory_limit=9MB", "data.eval_batch_size=200"],
            r"data.eval_batch_size=200: an evaluation needs .* at most data.eval_batch_size=\d+ fits",
        ),
    ],
)
def test_what_cannot_fit_is_refused_by_name(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure_steps(composed(*LENET, *overrides), RankInfo())


def test_a_floor_above_the_limit_names_what_the_smallest_micro_batch_needs() -> None:
    with trial_run(composed(*LENET)) as trial:
        planner = Planner(trial)
        planner.limit = Limit(planner.predicted_peak(96) - 1, "a test")
        with pytest.raises(UsageError, match="one sample a micro-batch needs"):
            planner.choose()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["accum.steps=four"], "accum.steps=four: a number of micro-batches, or auto"),
        (["accum.steps=0"], "accum.steps=0: at least 1"),
        (
            ["accum.steps=auto", "accum.micro_batch_size=8"],
            "accum.micro_batch_size=8: is what accum.steps=auto looks for",
        ),
        (["accum.memory_limit=lots"], "accum.memory_limit=lots: bytes above 0, or an amount such as 2GiB"),
        (["accum.memory_limit=0"], "accum.memory_limit=0: bytes above 0"),
        (["accum.steps=auto", "accum=fsdp", "accum.processes=1"], "accum.steps=auto: a rank cannot try"),
    ],
)
def test_a_wrong_word_gets_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        composed("device=cpu", *overrides)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_amounts_of_memory() -> None:
    amounts = {"2GiB": 2**31, "500MiB": 500 * 2**20, "24GB": 24 * 10**9, "1.5 kib": 1536, "77": 77, 77: 77}
    for text, expected in amounts.items():
        assert in_bytes("key", text) == expected
    assert batch_sizes(64, "4", None) == (64, 4, 16)
    assert batch_sizes(None, "auto", None) == (
        128,
        "auto",
        None,
    )


def test_what_follows_from_the_micro_batch_waits_for_it() -> None:
    config = composed(*RESNET, "model.norm=ghost")
    assert config.accum.steps == "auto" and config.accum.micro_batch_size is None
    again = from_hydra(json.loads(json.dumps(to_plain(config))))  # as it is handed to ranks
    given = composed(*RESNET[:1], *RESNET[2:], "accum.steps=3", "model.norm=ghost")
    assert to_plain(with_steps(again, 3)) == to_plain(given)
    assert given.model["ghost_size"] == 8


def test_a_limit_that_nothing_keeps_to_is_said(caplog: pytest.LogCaptureFixture) -> None:
    config = composed("accum.steps=4", "accum.memory_limit=1GiB")
    assert choose_steps(config, RankInfo()) == (config, {})
    assert "accum.memory_limit=1GiB: has no effect, accum.steps=auto keeps to it" in caplog.text
    caplog.clear()
    choose_steps(composed("accum.steps=4"), RankInfo())
    assert not caplog.text


def test_auto_gives_the_bits_of_the_number_and_is_recorded_as_one(tmp_path: Path) -> None:
    common = ["device=cpu", "model=mlp", "model.hidden=[64,64,64,64]", "model.dropout=0.2"]
    common += ["data.image_size=8", "data.batch_size=256", "data.eval_batch_size=8"]
    common += ["trainer.max_updates=8", "trainer.log_every=4", "tracking.system_metrics=false"]
    with trial_run(composed("accum.steps=auto", *common)) as trial:
        limit = round(1.005 * Planner(trial).predicted_peak(3))
    auto = run_command(
        "run", *common, "accum.steps=auto", f"accum.memory_limit={limit}", folder=tmp_path / "auto"
    )
    assert auto.code == 0 and not auto.stderr, auto
    run = only_run(tmp_path / "auto")
    record = record_of(run)
    steps = int(record.params["accum.steps"])
    assert steps > 1 and f"accum.steps=auto: {steps} micro-batches of" in auto.stdout
    assert record.params["accum.micro_batch_size"] == str(-(-256 // steps))
    plan = record.tags["accumexp.plan"]
    assert plan.startswith(f"{steps} micro-batches") and "predicted" in plan and "measured" in plan
    given = run_command("run", *common, f"accum.steps={steps}", folder=tmp_path / "given")
    assert given.code == 0, given
    other = only_run(tmp_path / "given")
    timed = ("perf/", "time")
    for row, expected in zip(journal(run), journal(other), strict=True):
        keys = [key for key in row if not key.startswith(timed)]
        assert [row[key] for key in keys] == [expected[key] for key in keys]
    more = run_command("run", f"resume={run}", "trainer.max_updates=10", folder=tmp_path / "auto")
    assert more.code == 0 and "accum.steps=auto" not in more.stdout, more
    assert only_run(tmp_path / "auto") == run and len(journal(run)) >= 10


@pytest.mark.slow
def test_ranks_take_the_most_steps_that_any_of_them_needs(tmp_path: Path) -> None:
    from ..support.ranks import on_ranks

    results = on_ranks(2, tmp_path, _agree)
    assert results[0]["needed"] == 1 < results[1]["needed"] == results[0]["agreed"] == results[1]["agreed"]
    assert results[0]["refused"] == results[1]["refused"] and "one sample" in results[0]["refused"]


def _agree() -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    rank_info = RankInfo(rank, 2, rank, 2)
    overrides = [*LENET, "accum=ddp", "accum.processes=2"]

    def config(limit: int | None) -> Config:
        base = composed(*overrides)
        accum = dataclasses.replace(base.accum, memory_limit=limit if rank else None)
        return dataclasses.replace(base, accum=accum)

    with trial_run(config(None), rank_info) as trial:
        limit = round(1.005 * Planner(trial).predicted_peak(6))
    with trial_run(config(limit), rank_info) as trial:
        needed: Point = Planner(trial).choose()
    point, _ = measure_steps(config(limit), rank_info)
    refused = ""
    try:
        measure_steps(config(1000), rank_info)
    except UsageError as error:
        refused = str(error)
    return {"needed": needed.steps, "agreed": point.steps, "refused": refused}
