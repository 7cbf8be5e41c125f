"""Many seeds in one loop: each replica is a trainer of its own, and their updates are made together.

for every update:
    each replica: whatever its run has between two updates (evaluation, checkpoints), then its next batch
    all: one window over the stacked models, one step
    each replica: its schedule, its readings, its record
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, cast

from ..accum import OptimizerStep, WindowResult, measure_activations, tensors
from ..accum.replica_step import ReplicaStep
from ..accum.replica_window import ReplicaWindow
from ..data import Batch
from ..data.replica_batches import PlannedBatches, gathered
from ..errors import TrainingError
from .callbacks import Callback
from .out_of_memory import NoMemoryFor
from .progress import Progress
from .trainer import Trainer

Ended = Callable[[Trainer, TrainingError | None], None]


class ReplicaTrainer:
    """Trains R replicas update by update; each is to the end what its trainer would have made alone.

    A replica that ends before the others (its callback stops it, its loss is not finite) leaves the stack,
    and they go on. `stop` ends all of them after the present update.

    Args:
        trainers: of equal experiments but for the seed, none of which has begun, at the same update; their
            training data are `PlannedBatches` of the same samples.
        displays: callbacks that show the mean of the replicas; this object is the trainer they are told of.

    Attributes:
        running: the trainers that have not ended, in the order of the stack.
        latest: the means over them of what was logged last.
    """

    def __init__(self, trainers: Sequence[Trainer], displays: Sequence[Callback] = ()) -> None:
        self.trainers = tuple(trainers)
        self.running = list(trainers)
        self.window = ReplicaWindow([trainer.window for trainer in trainers])
        self.step = ReplicaStep(self.window, [cast(OptimizerStep, trainer.step) for trainer in trainers])
        self.displays = list(displays)
        self.epochs = trainers[0].epochs
        self.total_updates = trainers[0].total_updates
        self.latest: dict[str, float] = {}
        self._courses: dict[Trainer, Generator[Batch]] = {}

    @property
    def progress(self) -> Progress:
        """Of the replica that has come furthest."""
        return max((trainer.progress for trainer in self.trainers), key=lambda progress: progress.update)

    @staticmethod
    def feeds(trainers: Sequence[Trainer]) -> list[PlannedBatches]:
        return [cast(PlannedBatches, trainer.splits.train) for trainer in trainers]

    def stop(self, reason: str, code: int = 1) -> None:
        """Asks every replica to end."""
        for trainer in self.running:
            trainer.stop(reason, code)

    def fit(self, ended: Ended) -> None:
        """Trains until the last replica has ended; tells `ended` of each, and of the error it failed with."""
        self._courses = {trainer: trainer.course() for trainer in self.running}
        self._show("run_begin")
        try:
            while self.running:
                batches = self._next(ended)
                if self.running:
                    self._update(batches, ended)
        finally:
            for course in self._courses.values():
                course.close()
            self._show("run_end")

    def _next(self, ended: Ended) -> list[Batch]:
        """The next batch of each replica that has one; the others have ended."""
        found = []
        for trainer in tuple(self.running):
            trainer.in_step = self.running
            try:
                found.append(next(self._courses[trainer]))
            except StopIteration:
                self._end(trainer, None, ended)
            except TrainingError as error:
                self._end(trainer, error, ended)
        return found

    def _end(self, trainer: Trainer, error: TrainingError | None, ended: Ended) -> None:
        with trainer.off_the_clock():  # of those that go on, too
            ended(trainer, error)
        self.running.remove(trainer)

    def _update(self, planned: list[Batch], ended: Ended) -> None:
        """One update of all that run."""
        running = tuple(self.running)
        if len(running) < len(self.window.windows):
            own = [trainer.window for trainer in running]
            which = [r for r, window in enumerate(self.window.windows) if window in own]
            self.window.keep(which)
            self.step.keep(which)
        if running[0].progress.epoch_update == 0:
            self._show("epoch_begin")
        publishes = running[0].publishes
        inputs, targets, batches = gathered(planned, self.feeds(running), running[0].progress.epoch)
        for trainer, batch in zip(running, batches, strict=True):
            trainer.begin(batch)
        with NoMemoryFor(f"an update of {len(running)} replicas", "take fewer, or more accum.steps"):
            results = self._accumulate(inputs, targets, batches[0].steps)
            done = self.step(want_norm=publishes) or [None] * len(running)
        for trainer, result, step in zip(running, results, done, strict=True):
            try:
                trainer.finish(result, step)
            except TrainingError as error:
                self._fail(trainer, error, ended)
        if publishes and self.running:
            self.latest.update(mean([trainer.latest for trainer in self.running]))
            self._show("logged", self.latest)

    def _fail(self, trainer: Trainer, error: TrainingError, ended: Ended) -> None:
        try:
            self._courses[trainer].throw(error)
        except TrainingError:
            self._end(trainer, error, ended)

    def _accumulate(self, inputs: Any, targets: Any, steps: int) -> list[WindowResult]:
        observe = [trainer.observe for trainer in self.running]
        first = self.running[0]
        if first.progress.update:
            return self.window.backward(inputs, targets, steps=steps, observe=observe)
        with measure_activations(first.model, [*tensors(inputs), *tensors(targets)]) as saved:
            results = self.window.backward(inputs, targets, steps=steps, observe=observe)
        for trainer in self.running:
            trainer.progress.activation_bytes = saved.peak_bytes // len(self.running)
        return results

    def _show(self, event: str, *arguments: Any) -> None:
        for display in self.displays:
            getattr(display, event)(self, *arguments)


def mean(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every value that all have."""
    shared = [key for key in values[0] if all(key in one for one in values)] if values else []
    return {key: sum(one[key] for one in values) / len(values) for key in shared}
