"""The loop, and nothing else: what is trained, logged and saved is handed to it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from ..accum import (
    GraphedStep,
    GraphedWindow,
    OptimizerStep,
    Record,
    StepResult,
    Window,
    WindowResult,
    measure_activations,
    rates_as_numbers,
    tensors,
)
from ..data import Batch, Splits
from ..environment.device import wait_for
from ..environment.memory import MIB, peak_memory_mib
from ..errors import compiler_error
from .callbacks import Callback, listeners
from .deferred_metrics import DeferredMetrics, hopeless
from .evaluation import Evaluator, WindowMetrics
from .out_of_memory import NoMemoryFor, OutOfMemoryHandler
from .progress import MetricsSink, Progress, total_updates
from .stop_request import StopRequest
from .throughput import Throughput

# Updates whose points are all published: where the losses of equal windows differ by rounding alone.
FIRST_UPDATES = 100


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
        recover: split a window finer that runs out of memory, and all that follow.
        record: replay windows and steps as graphs that this recorded, such as `CudaGraphs`.

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
        metrics_sink: MetricsSink,
        callbacks: Mapping[str, Callback],
        *,
        device: torch.device,
        epochs: int,
        max_updates: int | None = None,
        log_every: int = 10,
        eval_every: int = 1,
        clip_norm: float | None = None,
        check_finite: bool = True,
        recover: bool = False,
        record: Record | None = None,
    ) -> None:
        self.model: nn.Module = window.model
        self.window = window
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.splits = splits
        self.evaluator = evaluator
        self.train_metrics = WindowMetrics(train_metrics)
        self.metrics_sink = metrics_sink
        self.callbacks = dict(callbacks)
        self.device = device
        self.epochs = epochs
        self.total_updates = total_updates(len(splits.train), epochs, max_updates)
        self.log_every = log_every
        self.eval_every = eval_every
        step = OptimizerStep(window, optimizer, clip_norm)
        self.step = step if record is None else GraphedStep(step, record)
        graphed = None if record is None else GraphedWindow(window, record)
        self.progress = Progress()
        self.batch: Batch | None = None
        self.latest: dict[str, float] = {}
        self._stopping = StopRequest(window.sync.ranks)
        self._readings = DeferredMetrics(window, check_finite)
        self.out_of_memory = OutOfMemoryHandler(window, recover, graphed.backward if graphed else None)
        window.on_discard.append(self.train_metrics.discard)
        self._no_memory_to_step = NoMemoryFor(
            "the optimizer's step", "take one that keeps less state, or accum=fsdp"
        )
        self._measures = True  # the activations of the next window
        self._measured = False  # and nobody has been told
        self._pace = Throughput()
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

    @property
    def stop_reason(self) -> str | None:
        """Why the run ends before its last update, or None."""
        return self._stopping.reason

    @property
    def stop_code(self) -> int:
        """The code that `stop` was given, on any rank; 0 as long as nobody asked."""
        return self._stopping.code

    def stop(self, reason: str, code: int = 1) -> None:
        """Asks the loop to end: after this update, or after the evaluation it is in.

        On several ranks it ends on all of them alike, at most one update later. `code` is the number of
        the signal that asks, or 1; all ranks learn it as `stop_code`.
        """
        self._stopping.wish(reason, code)

    def go_on(self) -> None:
        """Forgets a request to stop, so that `fit` goes on."""
        self._stopping.discard()

    def fit(self) -> None:
        """Trains until the last update or a stop request, from wherever `progress` is.

        Raises:
            TrainingError: for a loss of inf or nan with `check_finite`, or a model that torch cannot compile.
        """
        try:
            with closing(self.course()) as course:
                for batch in course:
                    self.update(batch)
        except RuntimeError as error:
            if explained := compiler_error(error):
                raise explained from error
            raise

    def course(self) -> Generator[Batch]:
        """The run as the batches of its updates, each of which must be made before the next is asked for.

        What is between updates (evaluation, the ends of epochs) is done on the way to the next batch.
        """
        self._events = listeners(self.callbacks.values())
        self._pace.go_on()
        self._pace.mark(self.progress)
        self._emit("run_begin")
        self._stopping.now()
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
            self._stopping.soon()
            if self.stop_reason or self.finished:
                break
        self.read()
        if self.stop_reason:
            return
        if progress.epoch_update == len(self.splits.train):
            progress.epoch, progress.epoch_update = progress.epoch + 1, 0
        if self.finished or progress.epoch % self.eval_every == 0:
            values = self.evaluate("eval")
            self.metrics_sink.record(progress.update, values, publish=True)
            self._stopping.now()
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
        rate = self.optimizer.param_groups[0]["lr"]
        rate = rate.clone() if isinstance(rate, Tensor) else float(rate)
        if done is None:
            with self._no_memory_to_step:
                done = self.step(publish)
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
        if self.window.sync.keeps_gradients:
            self.optimizer.zero_grad(set_to_none=False)
        else:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        following, on_discard = self.progress.update + 1, self.window.on_discard
        if not self._measures:
            result = self.out_of_memory.backward(following, batch, self.observe)
            self._measures = following in self.out_of_memory.steps
            return result
        with measure_activations(self.model, [*tensors(batch.inputs), *tensors(batch.targets)]) as saved:
            on_discard.append(saved.start_anew)
            result = self.out_of_memory.backward(following, batch, self.observe)
            on_discard.remove(saved.start_anew)
        self.progress.activation_bytes = saved.peak_bytes
        self._measures, self._measured = False, True
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
            if update in self.out_of_memory.steps:
                values["accum/steps"] = self.out_of_memory.steps.pop(update)
                publish = True
            self.metrics_sink.record(update, values, publish or update <= FIRST_UPDATES)
        if reading.trouble:
            raise reading.trouble
        if self.finished and reading.scaling.get("accum/skipped_windows") == newest:
            raise hopeless(reading.scaling["accum/loss_scale"], newest, newest)

    def _publish(self, norm: Tensor | None) -> None:
        extra: dict[str, float] = {}
        if norm is not None and math.isfinite(length := float(norm)):
            extra["train/grad_norm"] = length
        extra.update({f"train/{name}": value for name, value in self.train_metrics.values().items()})
        extra.update(self._pace.speeds(self.progress))
        extra["perf/peak_memory_mib"] = peak_memory_mib(self.device)
        if self._measured or self.progress.update <= self.log_every:
            self._measured = False
            extra["perf/activation_mib"] = self.progress.activation_bytes / MIB
        self._pace.mark(self.progress)
        self._emit("measured", extra)
        self.read(extra)
        self._emit("logged", self.latest)

    def evaluate(self, split: str) -> dict[str, float]:
        """Loss and metrics of "eval" or "test", as `<split>/<name>`, with what callbacks add."""
        no_memory = NoMemoryFor(f"the evaluation on {split}", "lower data.eval_batch_size")
        with self.off_the_clock(), no_memory:
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
            trainer._pace.tick(trainer.progress)
        try:
            yield
        finally:
            wait_for(self.device)
            for trainer in self.in_step:
                trainer._pace.go_on()

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
            "steps": self.window.steps,
            "model": self.model.state_dict() if whole else {},
            "optimizer": rates_as_numbers(self.optimizer.state_dict()) if whole else {},
            "scheduler": self.scheduler.state_dict(),
            "loss_scale": {} if scale is None else scale.state_dict(),
            "shortage": self.out_of_memory.state_dict(),
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
        if state.get("shortage"):
            self.out_of_memory.load_state_dict(state["shortage"])
        for name, callback in self.callbacks.items():
            if state["callbacks"].get(name):
                callback.load_state_dict(state["callbacks"][name])
        self.progress = Progress(**state["progress"])
        self._measures = not self.progress.update or state.get("steps") != self.window.steps
