"""Many seeds in one loop: each replica has its own trainer, and all make their updates together.

for every update:
    each replica: what its run does between updates (evaluation, checkpoints), then its next batch
    all: one window over the stacked models, one optimizer step
    each replica: its schedule and its metrics
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
    """Trains R replicas update by update; each gets the result that its trainer alone would get.

    A replica that ends before the others (a callback stops it, its loss is not finite) leaves the stack, and
    the others go on. `stop` ends all of them after the present update.

    Args:
        trainers: of equal experiments but for the seed, none of which has begun, at the same update; their
            training data are `PlannedBatches` of the same samples.
        displays: callbacks that show the mean of the replicas; they get this object as their trainer.

    Attributes:
        running: the trainers that have not ended, in the order of the stack.
        latest: the means over them of the newest metrics.
    """

    def __init__(self, trainers: Sequence[Trainer], displays: Sequence[Callback] = ()) -> None:
        self.trainers = tuple(trainers)
        self.running = list(trainers)
        self.window = ReplicaWindow([trainer.window for trainer in trainers])
        self.step = ReplicaStep(self.window, [cast(OptimizerStep, trainer.step) for trainer in trainers])
        self.displays = list(displays)
        self.options = trainers[0].options
        self.title = ""
        self.total_updates = trainers[0].total_updates
        self.latest: dict[str, float] = {}
        self._batches: dict[Trainer, Generator[Batch]] = {}

    @property
    def progress(self) -> Progress:
        """That of the replica with the most updates."""
        return max((trainer.progress for trainer in self.trainers), key=lambda progress: progress.update)

    @staticmethod
    def feeds(trainers: Sequence[Trainer]) -> list[PlannedBatches]:
        return [cast(PlannedBatches, trainer.splits.train) for trainer in trainers]

    def stop(self, reason: str, code: int = 1) -> None:
        """Requests every replica to end."""
        for trainer in self.running:
            trainer.stop(reason, code)

    def fit(self, ended: Ended) -> None:
        """Trains until the last replica has ended; calls `ended` with each, and the error it failed with."""
        self._batches = {trainer: trainer.batches() for trainer in self.running}
        self._show("run_begin")
        try:
            while self.running:
                batches = self._next(ended)
                if self.running:
                    self._update(batches, ended)
        finally:
            for batches in self._batches.values():
                batches.close()
            self._show("run_end")

    def _next(self, ended: Ended) -> list[Batch]:
        """The next batch of each replica that has one; ends the others."""
        batches = []
        for trainer in tuple(self.running):
            trainer.in_step = self.running
            try:
                batches.append(next(self._batches[trainer]))
            except StopIteration:
                self._end(trainer, None, ended)
            except TrainingError as error:
                self._end(trainer, error, ended)
        return batches

    def _end(self, trainer: Trainer, error: TrainingError | None, ended: Ended) -> None:
        with trainer.off_the_clock():  # nor on that of the other replicas
            ended(trainer, error)
        self.running.remove(trainer)

    def _update(self, planned: list[Batch], ended: Ended) -> None:
        """One update of all that run."""
        running = tuple(self.running)
        if len(running) < len(self.window.windows):
            kept = [trainer.window for trainer in running]
            rows = [r for r, window in enumerate(self.window.windows) if window in kept]
            self.window.keep(rows)
            self.step.keep(rows)
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
            self._batches[trainer].throw(error)
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
    """The mean of every metric that all have."""
    keys = [key for key in values[0] if all(key in metrics for metrics in values)] if values else []
    return {key: sum(metrics[key] for metrics in values) / len(values) for key in keys}
