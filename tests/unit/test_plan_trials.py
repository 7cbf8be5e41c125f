"""A trial run of the plan: whole batches, the run's own evaluations, and no leftovers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from accumexp.config.loading import with_steps
from accumexp.environment.ranks import RankInfo
from accumexp.errors import UsageError
from accumexp.plan.auto_steps import measure_steps
from accumexp.plan.frontier import measure_frontier
from accumexp.plan.planner import Planner
from accumexp.plan.trial_run import TrialRun, trial_run
from accumexp.training.callbacks import Callback

from ..support.experiments import composed
from ..support.planned import AUTO, LENET, taken_by

FEW = [*AUTO, "model=mlp", "model.hidden=[8]", "optimizer=adam", "data.eval_batch_size=64"]


def test_an_epoch_of_less_than_two_batches_is_tried_with_whole_ones(tmp_path: Path) -> None:
    """Of 1,293 samples the second update has 293, and no optimizer state is there in the first."""
    wide = ["data.image_size=8", "model.hidden=[256,256]"]
    config = composed(*FEW, *wide, "data.batch_size=1000", "trainer.epochs=9")
    with trial_run(config) as trial:
        planner = Planner(trial)
        point = planner.measure(1)
        assert point.measured == pytest.approx(point.predicted, rel=0.01)
    taken = taken_by(with_steps(config, 1), tmp_path / "trace", updates=3)
    assert point.measured and 0.97 * taken <= point.measured and taken <= 1.001 * point.predicted


def test_no_more_samples_are_planned_with_than_there_are(tmp_path: Path) -> None:
    config = composed(*FEW, "data.batch_size=5000")
    frontier = measure_frontier(config, None, lambda stage: None, lambda steps: [1, 2, 8])
    assert (frontier.batch_size, frontier.samples) == (5000, 1293)
    for point in frontier.points:
        taken = taken_by(with_steps(config, point.steps), tmp_path / "trace", updates=2)
        assert point.measured == pytest.approx(taken, rel=0.02)
        assert taken <= point.predicted <= 1.1 * taken


def test_a_trial_that_fails_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffers would take the gradients of all windows that follow."""
    low = [*LENET, "param_precision=bf16", "precision=bf16", "accum.fp32_buffers=true"]
    with trial_run(composed(*low)) as trial:
        expected = trial.small(4, 2)
        backward = torch.Tensor.backward

        def fails(self: torch.Tensor, *arguments: Any, **options: Any) -> None:
            backward(self, *arguments, **options)
            raise ValueError("Expected more than 1 value per channel when training")

        with monkeypatch.context() as broken:
            broken.setattr(torch.Tensor, "backward", fails)
            with pytest.raises(ValueError, match="more than 1 value"):
                trial.small(4, 2)
        assert all(p.grad is None for p in trial.experiment.model.parameters())
        again = trial.small(4, 2)
        assert again.update.peak == pytest.approx(expected.update.peak, rel=0.001)
        assert (again.gradients, again.state) == (expected.gradients, expected.state) and again.state > 0


def test_an_evaluation_is_planned_as_it_will_be(tmp_path: Path) -> None:
    """Two batches of 100 and a smaller one, of which a second is gathered while the first is there."""
    config = composed(
        *FEW[:-1],
        "data.batch_size=4",
        "data.eval_batch_size=100",
        "data.image_size=64",
        "data.eval_fraction=0.2",
    )
    with trial_run(config) as trial:
        planner = Planner(trial)
        point, evaluation = planner.measure(1), planner.evaluation(trial.data.evaluated)
        assert trial.data.evaluated == 100
    taken = taken_by(with_steps(config, 1), tmp_path / "trace")
    assert point.measured and taken == pytest.approx(evaluation, rel=0.01) and taken > 1.05 * point.measured


def test_ranks_share_an_evaluation() -> None:
    sizes = {}
    for overrides in ([], ["accum=ddp", "accum.processes=2"]):
        with trial_run(composed(*FEW, *overrides)) as trial:
            sizes[trial.ranks] = trial.data.evaluated, trial.local_ranks
    assert sizes == {1: (64, 1), 2: (32, 2)}


class EndsAtOnce(Callback):
    def update_end(self, trainer: Any) -> None:
        trainer.stop("enough")


def test_a_run_that_ends_before_its_memory_is_known_is_refused() -> None:
    config = composed(*FEW, f"+callbacks.ends._target_={__name__}.EndsAtOnce")
    with pytest.raises(UsageError, match="accum.steps=auto: enough ends after update 1, and 2 are needed"):
        measure_steps(config, RankInfo())


def one_cycle(optimizer: Any, total_updates: int) -> Any:
    """A schedule that cannot be stepped beyond its end."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=total_updates)


def test_a_schedule_that_ends_with_the_run_does_not_end_the_timing() -> None:
    cycle = f"scheduler._target_={__name__}.one_cycle"
    with trial_run(composed(*FEW, cycle, "trainer.max_updates=2")) as trial:
        assert trial.seconds(2, 5) > 0


def test_what_takes_the_room_is_named() -> None:
    with pytest.raises(UsageError, match="of which the data set takes 7.1 MiB unless data.resident=false"):
        measure_steps(composed(*LENET, "accum.memory_limit=7500KiB"), RankInfo())


def test_a_finest_split_that_does_not_run_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: TrialRun, steps: int) -> Any:
        raise ValueError("Expected more than 1 value per channel when training\nmore")

    with trial_run(composed(*LENET, "data.batch_size=4")) as trial:
        planner = Planner(trial)
        monkeypatch.setattr(TrialRun, "whole", refuses)
        with pytest.raises(UsageError) as refused:
            planner.choose()
    message = (
        "accum.steps=auto: an update with one sample a micro-batch does not run (Expected more than 1 value"
    )
    assert str(refused.value).startswith(message) and len(str(refused.value).splitlines()) == 1


def test_what_was_said_of_logging_before_is_true_again() -> None:
    logging.disable(logging.INFO)
    try:
        with trial_run(composed(*FEW)):
            assert logging.root.manager.disable == logging.WARNING
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(logging.NOTSET)
