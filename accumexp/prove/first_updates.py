"""The first updates of the run's own trainer, compared update by update, and resumed midway."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ..config.schema import Config, Precision
from ..config.validation import complete
from ..environment.random_state import random_state, restore_random_state
from ..environment.ranks import RankInfo, broadcast_from_first
from ..errors import UsageError
from ..proof.certificate import Check
from ..proof.own_precision import OwnPrecisionReplay
from ..proof.problem import Problem, is_large
from ..proof.ranks import all_gather
from ..proof.replay_float64 import Float64Replay
from ..proof.window_checks import state_errors
from ..training.callbacks import Callback, RunState, without_output
from ..training.checkpoint import Checkpoints, load, restore
from ..training.experiment import Experiment
from ..training.metrics_sink import MemoryMetricsSink
from ..training.preflight import check_batch_statistics
from ..training.trainer import Trainer
from .trainer_loop import compile_as_run
from .update_observer import UpdateObserver

# Updates in an epoch of the replayed run, before its last and smaller one: three epochs in 100 updates.
EPOCH = 33
# Updates beyond the end of the first epoch of the run that is resumed midway.
BEYOND = 7
# Both for a large model, in the run that is resumed midway.
IF_LARGE = 3
# Samples in a micro-batch: a BatchNorm needs two, and the ragged last windows halve them.
MICRO_BATCH = 4
RESUME = (
    "weights, buffers, optimizer, schedule and logged losses of a run without a stop: not a bit may differ"
)


def own_precision_config(config: Config, updates: int) -> Config:
    """`config` for `updates` in its own precision, without evaluation, proof, graphs and compilation."""
    changed = copy.deepcopy(config)
    changed.trainer.max_updates = updates
    changed.trainer.epochs = updates
    changed.trainer.eval_every = updates + 1
    changed.trainer.graph = False  # hooks do not run in a replayed graph
    changed.trainer.compile = False  # the proof compiles by itself, see `compile_as_run`
    changed.prove = False
    return complete(changed)


def fp64_config(config: Config, rank_info: RankInfo, updates: int, whole: bool) -> Config:
    """`config` for `updates` in fp64, on small batches unless they must be `whole`."""
    changed = own_precision_config(config, updates)
    changed.precision, changed.param_precision = Precision.fp64, None
    steps, full = changed.accum.steps, changed.data.batch_size
    assert isinstance(steps, int) and full is not None
    if not whole:
        changed.data.batch_size = min(full, MICRO_BATCH * steps * rank_info.size + 1)
    changed.accum.micro_batch_size = None
    changed.accum.growth_interval = min(changed.accum.growth_interval, 10)
    return complete(changed)


class FirstUpdates:
    """The first updates of a run, in short epochs.

    Args:
        config: of the experiment that is replayed, with as many updates.
        run: the run's experiment, which gives the length of the schedule and whether it compiles.
        stage: called with a description of the progress.
        epoch: updates in an epoch before its last, smaller one.
    """

    def __init__(
        self, config: Config, run: Experiment, stage: Callable[[str], None], epoch: int = EPOCH
    ) -> None:
        self.experiment = Experiment.build(config, run.rank_info)
        self.run = run
        self.stage = stage
        self.epoch = epoch
        self._random = random_state()
        splits = self.experiment.splits
        size = splits.train.batch_size
        self._shorten_epochs(epoch * size)
        for split in (splits.eval, splits.test):
            split.indices = split.indices[:size]

    def close(self) -> None:
        """Ends the processes that read the data."""
        self.experiment.splits.close()

    def _shorten_epochs(self, whole: int) -> None:
        """Ends epochs within the updates that are replayed, after `whole` samples and a smaller window.

        The window has half of the samples, or the largest number of which the model takes every micro-batch:
        batch statistics refuse a single sample.

        Raises:
            UsageError: if full windows have a micro-batch of one sample, and the model refuses it.
        """
        experiment, train = self.experiment, self.experiment.splits.train
        indices, steps = train.indices, cast(int, experiment.config.accum.steps)
        size = train.batch_size
        for number in (size // 2 + 1, *range(size - 1, -1, -1)):
            train.indices = indices[: whole + number]
            try:
                ranks = experiment.rank_info.size
                check_batch_statistics(experiment.model, train, steps, ranks, experiment.autocast)
                return
            except UsageError:
                if not number:
                    raise

    def problem(self, problem: Problem) -> Problem:
        """`problem` with this experiment's model and loss."""
        return replace(problem, model=copy.deepcopy(self.experiment.model), loss=self.experiment.criterion)

    def trainer(self, extra: Mapping[str, Callback]) -> Trainer:
        """The run's trainer at its beginning, with `extra` and its callbacks except those that show or save.

        Callbacks of the run may request a stop, but only a forced one ends it.
        """
        restore_random_state(self._random)
        experiment = replace(self.experiment, model=copy.deepcopy(self.experiment.model))
        options = replace(experiment.options, may_stop=False)
        trainer = experiment.trainer(MemoryMetricsSink(), self.run.updates, options)
        trainer.callbacks = {**without_output(trainer.callbacks), **extra}
        return trainer

    def replay_own_precision(self, problem: Problem, updates: int) -> OwnPrecisionReplay:
        """Compares `updates` that are not skipped, in the run's own precision."""
        observer = UpdateObserver(problem, OwnPrecisionReplay, self.stage, updates)
        self._fit(observer)
        return observer.replay

    def replay_float64(self, problem: Problem) -> tuple[Float64Replay, list[Check]]:
        """Compares all updates in fp64; the checks are of an epoch's samples and of resuming the run."""
        observer = UpdateObserver(problem, Float64Replay, self.stage)
        trainer = self._fit(observer)
        replay = observer.replay
        for update, values in _rows(trainer):
            if "train/loss" in values:
                replay.compare_loss(update, values["train/loss"])
        checks = [observer.samples_check(trainer)]
        self.stage("a stop in the middle, and the rest from the checkpoint")
        checks.append(self._resume_check())
        return replay, checks

    def _fit(self, observer: UpdateObserver[Any]) -> Trainer:
        trainer = self.trainer({"observer": observer})
        compile_as_run(self.run, trainer.model)
        observer.attach(trainer)
        trainer.fit()
        return trainer

    def _resume_check(self) -> Check:
        """Compares the run that is stopped midway and resumed with the run without a stop."""
        epoch, beyond = self.epoch, BEYOND
        if is_large(self.experiment.model) and epoch > IF_LARGE:
            epoch = beyond = IF_LARGE
            self._shorten_epochs(epoch * self.experiment.splits.train.batch_size)
        updates = min(cast(int, self.experiment.config.trainer.max_updates), epoch + beyond)
        half = max(1, updates // 2)
        undisturbed = self.trainer({"end": StopAt(updates)})
        undisturbed.fit()
        stopped = self.trainer({})
        with tempfile.TemporaryDirectory(prefix="accumexp-proof-") as temporary:
            folder = Path(broadcast_from_first(temporary, self.experiment.rank_info))
            checkpoints = Checkpoints(every_epochs=None, every_updates=half)
            checkpoints.run_opened(stopped, RunState(folder, {}, lambda: None))
            stopped.callbacks = {**stopped.callbacks, "checkpoint": checkpoints, "stop": StopAt(half)}
            stopped.fit()
            all_gather(0)
            update = stopped.progress.update
            path = checkpoints.folder / f"update-{update:08d}.pt"
            resumed = self.trainer({"end": StopAt(updates)})
            restore(resumed, load(path), path)
            resumed.fit()
            all_gather(0)
        differences = _differences(undisturbed, resumed)
        losses, resumed_losses = _losses_after(undisturbed, update), _losses_after(resumed, update)
        differences += sum(a != b for a, b in zip(losses, resumed_losses, strict=False))
        differences += abs(len(losses) - len(resumed_losses))
        figure = float(max(all_gather(differences)))
        at = f"stopped after update {update} of {updates}"
        return Check("resume from the middle", figure, 0.0, "count", RESUME, at)


def _rows(trainer: Trainer) -> list[tuple[int, dict[str, float]]]:
    assert isinstance(trainer.log.sink, MemoryMetricsSink)
    return [(update, values) for update, values, _ in trainer.log.sink.rows]


class StopAt(Callback):
    """Stops after an update, also where `LoopOptions.may_stop` is false."""

    order = 2

    def __init__(self, update: int) -> None:
        self.update = update

    def update_end(self, trainer: Trainer) -> None:
        if trainer.progress.update == self.update:
            trainer.stop("stopped to be resumed", force=True)


def _differences(one: Trainer, other: Trainer) -> int:
    """Number of tensors of model and optimizer, and other states, that differ in any bit."""
    errors = state_errors(other.model, one.model, other.optimizer, one.optimizer)
    differing = [error != 0 for error, _ in errors]
    differing.append(one.scheduler.state_dict() != other.scheduler.state_dict())
    differing.append(one.progress.samples != other.progress.samples)
    return sum(differing)


def _losses_after(trainer: Trainer, update: int) -> list[tuple[int, float, float]]:
    """(update, loss, learning rate) of the updates after `update`."""
    return [
        (number, values["train/loss"], values.get("train/lr", math.nan))
        for number, values in _rows(trainer)
        if number > update and "train/loss" in values
    ]
