"""The loop, and nothing else: what is trained, logged and saved is handed to it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from .accum import Agreement, OptimizerStep, StepResult, Window, WindowResult, measure_activations, tensors
from .callbacks import Callback, listeners
from .data import Batch, Splits
from .evaluation import Evaluator, WindowMetrics
from .readings import Readings, hopeless
from .system import MIB, peak_memory_mib, wait_for

# Updates whose points are all published: where the losses of equal windows differ by rounding alone.
FIRST_UPDATES = 100


class Recorder(Protocol):
    """Where points go."""

    def record(self, update: int, values: Mapping[str, float], publish: bool) -> None:
        """Keeps `values` of `update`; with `publish`, the tracker gets them too."""
        ...


@dataclass
class Progress:
    """How far a run is. All counts are of finished things.

    Attributes:
        epoch: epochs, and with it the one that the next update belongs to.
        update: updates since the run began.
        epoch_update: updates in the present epoch.
        samples: samples seen.
        seconds: time spent in the loop, without evaluation and checkpoints.
        activation_bytes: peak bytes saved for backward in the first window, 0 before it.
    """

    epoch: int = 0
    update: int = 0
    epoch_update: int = 0
    samples: int = 0
    seconds: float = 0.0
    activation_bytes: int = 0


class Trainer:
    """Trains one model, one update at a time.

    for every epoch:
        for every batch of the epoch, one an update:
            zero the gradients
            window: count its weight, then forward and backward of each micro-batch
            clip the gradient, step the optimizer (or skip, after an overflow), step the schedule
            every log_every updates: read the device, log
        evaluate on the eval split

    Everything in the inner loop happens once an update, whatever the number of micro-batches, and
    nothing in it waits for the device but the read every `log_every` updates (and, with a loss scale,
    an optimizer that is not fused). On several ranks each runs this loop on its own samples.

    A skipped window counts as an update on all step axes and in the schedule: `accum/skipped_windows`
    says how many of them left the weights as they were.

    Args:
        window: accumulates a batch's gradient into the model's parameters.
        train_metrics: torchmetrics over the windows of logged updates.
        epochs, max_updates: the run ends at whichever comes first.
        log_every: updates between two reads of the device.
        eval_every: epochs between two evaluations; the last is always evaluated.
        clip_norm: the 2-norm that the update's gradient is clipped to, or None.
        check_finite: fail on a loss that is inf or nan.

    Attributes:
        batch: this rank's samples of the update that is under way, or was the last.
        in_step: the trainers that stand still while this one is off the clock: itself, and those that make
            each of their updates together with it.
    """

    def __init__(
        self,
        window: Window,
        optimizer: Optimizer,
        scheduler: Any,
        splits: Splits,
        evaluator: Evaluator,
        train_metrics: MetricCollection,
        recorder: Recorder,
        callbacks: Mapping[str, Callback],
        *,
        device: torch.device,
        epochs: int,
        max_updates: int | None = None,
        log_every: int = 10,
        eval_every: int = 1,
        clip_norm: float | None = None,
        check_finite: bool = True,
    ) -> None:
        self.model: nn.Module = window.model
        self.window = window
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.splits = splits
        self.evaluator = evaluator
        self.train_metrics = WindowMetrics(train_metrics)
        self.recorder = recorder
        self.callbacks = dict(callbacks)
        self.device = device
        self.epochs = epochs
        self.total_updates = total_updates(len(splits.train), epochs, max_updates)
        self.log_every = log_every
        self.eval_every = eval_every
        self.step = OptimizerStep(window, optimizer, clip_norm)
        self.progress = Progress()
        self.batch: Batch | None = None
        self.stop_reason: str | None = None
        self.latest: dict[str, float] = {}
        self.stop_code = 0
        self._wish: str | None = None
        self._wish_code = 0
        self._agreement = Agreement(window.sync.ranks)
        self._readings = Readings(window, check_finite)
        self._clock = time.perf_counter()
        self._last_read = (0, 0, 0.0)  # update, samples, seconds
        self.in_step: Sequence[Trainer] = (self,)
        self._events: dict[str, list[Callable[..., None]]] = {}

    @property
    def finished(self) -> bool:
        return self.progress.update >= self.total_updates

    @property
    def publishes(self) -> bool:
        """Whether the next update, or in `update_begin` the one that begins, is published."""
        following = self.progress.update + 1
        return following % self.log_every == 0 or following == self.total_updates

    def stop(self, reason: str, code: int = 1) -> None:
        """Asks the loop to end: after this update, or after the evaluation it is in.

        On several ranks it ends on all of them alike, at most one update later. `code` is the number of
        the signal that asks, or 1; all ranks learn it as `stop_code`.
        """
        self._wish, self._wish_code = self._wish or reason, max(self._wish_code, code)

    def go_on(self) -> None:
        """Forgets a request to stop, so that `fit` goes on."""
        self.stop_reason, self.stop_code, self._wish, self._wish_code = None, 0, None, 0
        self._agreement = Agreement(self.window.sync.ranks)

    def _agree(self, agree: Callable[[int], int]) -> None:
        """Makes a wish to stop of any rank the `stop_reason` of all."""
        self.stop_code = agree(self._wish_code)
        if self.stop_code and self.stop_reason is None:
            self.stop_reason = self._wish or "another rank stopped"

    def fit(self) -> None:
        """Trains until the last update or a stop request, from wherever `progress` is.

        Raises:
            TrainingError: with `check_finite`, for a loss that is inf or nan.
        """
        with closing(self.course()) as course:
            for batch in course:
                self.update(batch)

    def course(self) -> Generator[Batch]:
        """The run as the batches of its updates, each of which must be made before the next is asked for.

        What is between updates (evaluation, the ends of epochs) is done on the way to the next batch.
        """
        self._events = listeners(self.callbacks.values())
        self._clock = time.perf_counter()
        self._mark_read()
        self._emit("run_begin")
        self._agree(self._agreement.now)
        try:
            while not self.stop_reason and not self._ended():
                yield from self._epoch()
        finally:
            self._emit("run_end")

    def _ended(self) -> bool:
        # A run stopped right after the last update of its last epoch still has that epoch to evaluate.
        return self.finished and self.progress.epoch_update != len(self.splits.train)

    def _epoch(self) -> Generator[Batch]:
        progress = self.progress
        self._emit("epoch_begin")
        self.model.train()
        for batch in self.splits.train.epoch(progress.epoch, progress.epoch_update):
            yield batch
            self._agree(self._agreement.soon)
            if self.stop_reason or self.finished:
                break
        self.read()
        if self.stop_reason:
            return
        if progress.epoch_update == len(self.splits.train):
            progress.epoch, progress.epoch_update = progress.epoch + 1, 0
        if self.finished or progress.epoch % self.eval_every == 0:
            values = self.evaluate("eval")
            self.recorder.record(progress.update, values, publish=True)
            self._agree(self._agreement.now)
        self._emit("epoch_end")

    def update(self, batch: Batch) -> None:
        """One update on `batch`, this rank's samples of it."""
        self.begin(batch)
        self.finish(self._accumulate(batch))

    def begin(self, batch: Batch) -> None:
        """Makes ready for the window of `batch`."""
        self.batch = batch
        self._emit("update_begin")

    @property
    def observe(self) -> Callable[..., None] | None:
        """What is to see the outputs of the window that is under way, if it is published."""
        return self.train_metrics.observe if self.publishes else None

    def finish(self, result: WindowResult, done: StepResult | None = None) -> None:
        """The update on the gradient of the window that began, its schedule and its record.

        Args:
            done: what its step did, if it has been made already.
        """
        progress, publish, batch = self.progress, self.publishes, self.batch
        assert batch is not None
        rate = float(self.optimizer.param_groups[0]["lr"])
        done = done or self.step(want_norm=publish)
        self._step_schedule()
        progress.update += 1
        progress.epoch_update += 1
        progress.samples += batch.total
        self._readings.add(progress.update, result.loss, done.overflow, rate)
        if publish:
            self._publish(done.norm)
        self._emit("update_end")

    def _step_schedule(self) -> None:
        if self.progress.update:
            self.scheduler.step()
            return
        with warnings.catch_warnings():
            # True if the first window was skipped, and meant so.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def _accumulate(self, batch: Batch) -> WindowResult:
        self.optimizer.zero_grad(set_to_none=not self.window.sync.keeps_gradients)
        options: dict[str, Any] = {"steps": batch.steps, "samples": batch.samples, "observe": self.observe}
        if self.progress.update:
            return self.window.backward(batch.inputs, batch.targets, **options)
        with measure_activations(self.model, [*tensors(batch.inputs), *tensors(batch.targets)]) as saved:
            result = self.window.backward(batch.inputs, batch.targets, **options)
        self.progress.activation_bytes = saved.peak_bytes
        return result

    def read(self, extra: Mapping[str, float] | None = None) -> None:
        """Reads the losses since the last read in one wait for the device, and records them.

        `extra` belongs to the newest update and makes it a published one.
        """
        reading = self._readings.read()
        newest = self.progress.update
        for update, values in reading.rows:
            publish = extra is not None and update == newest
            if publish:
                values.update({**(extra or {}), **reading.scaling})
                self.latest.update(values)
            self.recorder.record(update, values, publish or update <= FIRST_UPDATES)
        if reading.trouble:
            raise reading.trouble
        if self.finished and reading.scaling.get("accum/skipped_windows") == newest:
            raise hopeless(reading.scaling["accum/loss_scale"], newest, newest)

    def _publish(self, norm: Tensor | None) -> None:
        extra: dict[str, float] = {}
        if norm is not None and math.isfinite(length := float(norm)):
            extra["train/grad_norm"] = length
        extra.update({f"train/{name}": value for name, value in self.train_metrics.values().items()})
        self._tick()
        progress, (update, samples, seconds) = self.progress, self._last_read
        elapsed = max(progress.seconds - seconds, 1e-9)
        extra["perf/samples_per_second"] = (progress.samples - samples) / elapsed
        extra["perf/update_ms"] = 1e3 * elapsed / (progress.update - update)
        extra["perf/peak_memory_mib"] = peak_memory_mib(self.device)
        if update < self.log_every:
            extra["perf/activation_mib"] = progress.activation_bytes / MIB
        self._mark_read()
        self._emit("measured", extra)
        self.read(extra)
        self._emit("logged", self.latest)

    def evaluate(self, split: str) -> dict[str, float]:
        """Loss and metrics of "eval" or "test", as `<split>/<name>`, with what callbacks add."""
        with self.off_the_clock():
            self.window.sync.share_buffers()
            batches = self.splits.test if split == "test" else self.splits.eval
            values = {f"{split}/{k}": v for k, v in self.evaluator(self.model, batches).items()}
            self._emit("evaluated", split, values)
            self.latest.update(values)
        return values

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        wait_for(self.device)
        for trainer in self.in_step:
            trainer._tick()
        try:
            yield
        finally:
            wait_for(self.device)
            for trainer in self.in_step:
                trainer._clock = time.perf_counter()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._clock
        self._clock = now

    def _mark_read(self) -> None:
        self._last_read = (self.progress.update, self.progress.samples, self.progress.seconds)

    def _emit(self, event: str, *arguments: Any) -> None:
        for listener in self._events.get(event, ()):
            listener(self, *arguments)

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on, but the random state and the samples' order.

        Of a fully sharded model without model and optimizer, which are saved in parts (`shards`).
        """
        self.read()
        scale = self.window.loss_scale
        whole = not self.window.sync.sharded
        return {
            "progress": asdict(self.progress),
            "model": self.model.state_dict() if whole else {},
            "optimizer": self.optimizer.state_dict() if whole else {},
            "scheduler": self.scheduler.state_dict(),
            "loss_scale": {} if scale is None else scale.state_dict(),
            "callbacks": {name: callback.state_dict() for name, callback in self.callbacks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to where `state_dict` was taken."""
        if state["model"]:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.window.loss_scale is not None and state.get("loss_scale"):
            self.window.loss_scale.load_state_dict(state["loss_scale"])
        for name, callback in self.callbacks.items():
            if state["callbacks"].get(name):
                callback.load_state_dict(state["callbacks"][name])
        self.progress = Progress(**state["progress"])


def total_updates(updates_per_epoch: int, epochs: int, max_updates: int | None) -> int:
    """Updates in a run."""
    every = updates_per_epoch * epochs
    return every if max_updates is None else min(every, max_updates)
