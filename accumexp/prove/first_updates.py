"""The run itself under proof: the real trainer's first updates, one by one, and a stop in their middle."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..accum.batch import map_tensors, tensors
from ..accum.sync import plain
from ..config.schema import Config, Precision
from ..config.validation import check
from ..data import Batch
from ..environment.random_state import random_state, restore_random_state
from ..environment.ranks import RankInfo, broadcast_from_first
from ..proof.certificate import Check
from ..proof.gradients import DOUBLE
from ..proof.observation import Observation, watching
from ..proof.own_precision import OwnPrecisionReplay
from ..proof.problem import Batch as Whole
from ..proof.problem import Problem, Start
from ..proof.ranks import all_gather
from ..proof.replay import BITS, Replay, states
from ..training.callbacks import Callback, LossMonitor
from ..training.checkpoint import Checkpoints, load, restore
from ..training.experiment import Experiment
from ..training.progress_display import Progress
from ..training.trainer import Trainer

# Updates in an epoch of a followed run, before its last and smaller one: three epochs in 100 updates.
EPOCH = 33
# Updates of the run that is stopped in its middle: over the end of an epoch.
RESUMED = 40
# Samples in a micro-batch: a BatchNorm needs two, and the ragged last windows halve them.
MICRO = 4


def small(config: Config, rank_info: RankInfo, whole: bool, updates: int) -> Config:
    """`config` in fp64 for `updates`, of small ragged batches unless it must be the `whole` ones."""
    changed = copy.deepcopy(config)
    changed.precision, changed.param_precision = Precision.fp64, None
    steps, full = changed.accum.steps, changed.data.batch_size
    assert isinstance(steps, int) and full is not None
    if not whole:
        changed.data.batch_size = min(full, MICRO * steps * rank_info.size + 1)
    changed.accum.micro_batch_size = None
    changed.accum.growth_interval = min(changed.accum.growth_interval, 10)
    changed.trainer.max_updates = updates
    changed.trainer.epochs = updates
    changed.trainer.eval_every = updates + 1
    changed.prove = False
    changed.trainer.graph = False  # nobody can look into a replay
    return check(changed)


def as_it_is(config: Config, updates: int) -> Config:
    """`config` for `updates`, in its own precision and with its own batches."""
    changed = copy.deepcopy(config)
    changed.trainer.max_updates = updates
    changed.trainer.epochs = updates
    changed.trainer.eval_every = updates + 1
    changed.prove = False
    changed.trainer.graph = False
    return check(changed)


class FirstUpdates:
    """The first updates of a run.

    Args:
        updates: how many.
        schedule: updates in the run's whole schedule.
        stage: told how far it is.
        epoch: updates in an epoch before its last, smaller one.
    """

    def __init__(
        self,
        experiment: Experiment,
        updates: int,
        schedule: int,
        stage: Callable[[str], None],
        epoch: int = EPOCH,
    ) -> None:
        self.experiment = experiment
        self.updates = updates
        self.schedule = schedule
        self.stage = stage
        self._random = random_state()
        splits = experiment.splits
        size = splits.train.batch_size
        # Epochs that end, and end in a smaller window, within the updates that are followed.
        splits.train.indices = splits.train.indices[: epoch * size + size // 2 + 1]
        for split in (splits.eval, splits.test):
            split.indices = split.indices[:size]

    def trainer(self, extra: Mapping[str, Callback]) -> Trainer:
        """The real one from its beginning, with the run's own callbacks, but those that speak or save.

        Nothing but `StopAt` stops it early.
        """
        restore_random_state(self._random)
        experiment = replace(self.experiment, model=copy.deepcopy(self.experiment.model))
        trainer = experiment.trainer(Points(), self.schedule)
        kept = {
            name: callback
            for name, callback in trainer.callbacks.items()
            if not isinstance(callback, Checkpoints | Progress | LossMonitor)
        }
        trainer.callbacks = {**kept, **extra}
        trainer.stop = _not_now
        return trainer

    def own_precision(self, problem: Problem, name: str, updates: int) -> list[Check]:
        """What `updates` of the run in its own precision, `name`, show; skipped windows are none."""
        follower = UpdateObserver(problem, self, OwnPrecisionReplay, updates)
        trainer = self.trainer({"follower": follower})
        follower.attach(trainer)
        trainer.fit()
        assert isinstance(follower.course, OwnPrecisionReplay)
        return follower.course.checks(name)

    def checks(self, problem: Problem) -> tuple[list[Check], Replay]:
        """What following the run in fp64 shows, and what a stop and a resume do to it."""
        follower = UpdateObserver(problem, self, Replay)
        trainer = self.trainer({"follower": follower})
        follower.attach(trainer)
        trainer.fit()
        course = follower.course
        assert isinstance(course, Replay)
        for update, values in points(trainer):
            if "train/loss" in values:
                course.logged(update, values["train/loss"])
        checks = [*course.checks(), follower.samples_check()]
        self.stage("a stop in the middle, and the rest from the checkpoint")
        checks.append(self._resume())
        return checks, course

    def _resume(self) -> Check:
        """The run with a stop in its middle and without, to the bit."""
        updates = min(self.updates, RESUMED)
        half = max(1, updates // 2)
        undisturbed = self.trainer({"end": StopAt(updates)})
        undisturbed.fit()
        first = self.trainer({})
        with tempfile.TemporaryDirectory(prefix="accumexp-proof-") as own:
            folder = Path(broadcast_from_first(own, self.experiment.rank_info))
            saving = Checkpoints(every_epochs=None, every_updates=half)
            saving.attach(folder, {}, lambda: None)
            first.callbacks = {**first.callbacks, "checkpoint": saving, "stop": StopAt(half)}
            first.fit()
            all_gather(0)
            path = saving.folder / f"update-{first.progress.update:08d}.pt"
            again = self.trainer({"end": StopAt(updates)})
            restore(again, load(path), path)
            again.fit()
            all_gather(0)
        differing = sum(_differing(undisturbed, again))
        one, other = (_rows(run, first.progress.update) for run in (undisturbed, again))
        differing += sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))
        return Check(
            "resume from the middle",
            float(max(all_gather(differing))),
            0.0,
            "count",
            "weights, buffers, optimizer, schedule and logged losses of the run that was never stopped: "
            + BITS.partition(": ")[2],
            f"stopped after update {first.progress.update} of {updates}",
        )


class Points:
    """A recorder that keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def record(self, update: int, values: Mapping[str, float], publish: bool) -> None:
        self.rows.append((update, dict(values)))


def points(trainer: Trainer) -> list[tuple[int, dict[str, float]]]:
    assert isinstance(trainer.metrics_sink, Points)
    return trainer.metrics_sink.rows


def _not_now(reason: str, code: int = 1) -> None:
    """Instead of `Trainer.stop`: a callback may end the run, but not the proof of its updates."""


class StopAt(Callback):
    """Stops after an update, also where callbacks cannot."""

    order = 2

    def __init__(self, update: int) -> None:
        self.update = update

    def update_end(self, trainer: Trainer) -> None:
        if trainer.progress.update == self.update:
            Trainer.stop(trainer, "stopped to be resumed")


class UpdateObserver(Callback):
    """Holds every update of the trainer against the larger batch's."""

    order = -1000

    def __init__(
        self,
        problem: Problem,
        run: FirstUpdates,
        kind: type[Replay] | type[OwnPrecisionReplay],
        updates: int | None = None,
    ) -> None:
        self.problem = problem
        self.run = run
        self.kind = kind
        self.updates = updates
        self.epochs: dict[int, list[int]] = {}
        self._open = ExitStack()

    def attach(self, trainer: Trainer) -> None:
        dtype = DOUBLE if self.kind is Replay else self.problem.dtype
        self.start = Start(self.problem, dtype, trainer.model, trainer.optimizer)
        self.course = self.kind(self.problem, self.start)

    def update_begin(self, trainer: Trainer) -> None:
        batch = trainer.batch
        assert batch is not None
        self.batch, numbers = whole_batch(batch)
        self.epochs.setdefault(trainer.progress.epoch, []).extend(numbers)
        arrivals = self.kind is OwnPrecisionReplay or self.problem.scaling is not None
        self.seen: Observation = self._open.enter_context(watching(self.start, self.batch, arrivals))

    def update_end(self, trainer: Trainer) -> None:
        self._open.close()
        self.course.follow(self.batch, self.seen)
        if self.updates and self.course.updates >= self.updates:
            Trainer.stop(trainer, "seen enough")
        self.run.stage(f"update {trainer.progress.update} of {self.run.updates} beside the larger batch's")

    def run_end(self, trainer: Trainer) -> None:
        self._open.close()

    def samples_check(self) -> Check:
        """Whether every sample of the split came once in each epoch that was ended."""
        batches = self.run.experiment.splits.train
        due = len(batches.order(0))
        wrong, ended = 0, 0
        for epoch, numbers in self.epochs.items():
            if epoch + 1 in self.epochs or len(numbers) == due:
                ended += 1
                expected = set(batches.indices.tolist())
                found = set(numbers)
                wrong += len(found - expected) + len(numbers) - len(found) + abs(due - len(numbers))
        return Check(
            "samples of an epoch",
            float(wrong),
            0.0,
            "count",
            "every sample of the training split comes once an epoch",
            f"{due} samples in each of {ended} epochs",
            decided=ended > 0,
        )


def whole_batch(batch: Batch) -> tuple[Whole, list[int]]:
    """The update's batch over all ranks, and its samples' indices; all ranks must ask."""
    own = batch.samples
    device = tensors(batch.targets)[0].device

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:own].cpu()

    parts = all_gather(
        (map_tensors(cut, batch.inputs), map_tensors(cut, batch.targets), batch.indices[:own].cpu())
    )
    if len(parts) == 1:
        return (batch.inputs, batch.targets), batch.indices.tolist()
    numbers = [number for part in parts for number in part[2].tolist()]
    joined = tuple(_joined([part[k] for part in parts], device) for k in range(2))
    return joined, numbers  # type: ignore[return-value]


def _joined(parts: list[Any], device: torch.device) -> Any:
    columns = iter(zip(*(tensors(part) for part in parts), strict=True))
    return map_tensors(lambda _: torch.cat(next(columns)).to(device), parts[0])


def _differing(one: Trainer, other: Trainer) -> list[bool]:
    """For every tensor of model and optimizer, and the schedule, whether it is not the same to the bit."""
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    found = [not torch.equal(plain(value), plain(theirs[name])) for name, value in mine.items()]
    own, others = states(one.optimizer), states(other.optimizer)
    found.append(own.keys() != others.keys())
    found += [not torch.equal(plain(v), plain(others[k])) for k, v in own.items() if k in others]
    found.append(one.scheduler.state_dict() != other.scheduler.state_dict())
    found.append(one.progress.samples != other.progress.samples)
    return found


def _rows(trainer: Trainer, after: int) -> list[tuple[int, float, float]]:
    return [
        (update, values["train/loss"], values.get("train/lr", math.nan))
        for update, values in points(trainer)
        if update > after and "train/loss" in values
    ]
