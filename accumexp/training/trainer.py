"""The training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..accum import (
    GraphedStep,
    GraphedWindow,
    GraphRecorder,
    OptimizerStep,
    StepResult,
    Window,
    WindowResult,
)
from ..accum.refusals import Refused
from ..accum.sync import FrozenLater, unused_parameters
from ..data import Batch, Splits
from ..environment.device import wait_for
from ..environment.random_state import random_state
from ..errors import TrainingError, compiler_error
from .callbacks import Callback, listeners
from .evaluated_schedule import EvaluatedSchedule, evaluated_splits
from .evaluation import Evaluator
from .metrics import Metrics
from .metrics_log import MetricsLog, as_numbers
from .metrics_sink import MetricsSink
from .optimizers import in_eval_mode, learning_rates, set_mode
from .out_of_memory import NoMemoryFor, OutOfMemoryHandler
from .progress import LoopOptions, Progress
from .schedules import step_schedule
from .stop_request import StopRequest

log = logging.getLogger(__name__)

NO_MEMORY_TO_STEP = NoMemoryFor("the optimizer's step", "take one that keeps less state, or accum=fsdp")


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
    counts those that left the weights unchanged.

    Args:
        window: accumulates a batch's gradient into the model's parameters.
        scheduler: has `step`, called once an update, `state_dict` and `load_state_dict`.
        train_metrics: over the windows of published updates.
        graphs: records windows and steps as graphs and replays them, such as `CudaGraphs`.

    Attributes:
        batch: this rank's samples of the present or the last update.
        log: records the metrics; `latest` are its newest values.
        evaluated_splits: those that are evaluated at the ends of epochs.
        in_step: the trainers whose clocks stop while this one is off the clock: itself, and those whose
            updates are made together with its own.
        random_state: returns the state of the generators that a checkpoint keeps.
        title: precedes the epoch on the progress bar, such as "job 2 of 8, ".
    """

    def __init__(
        self,
        window: Window,
        optimizer: Optimizer,
        scheduler: Any,
        splits: Splits,
        evaluator: Evaluator,
        train_metrics: Metrics,
        metrics_sink: MetricsSink,
        callbacks: Mapping[str, Callback],
        options: LoopOptions,
        graphs: GraphRecorder | None = None,
    ) -> None:
        self.model: nn.Module = window.model
        self.window = window
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.splits = splits
        self.evaluator = evaluator
        self.callbacks = dict(callbacks)
        self.options = options
        self.device = next(self.model.parameters()).device
        self.evaluated_splits = evaluated_splits(splits.has_eval, scheduler, callbacks.values())
        self.total_updates = options.total_updates(len(splits.train))
        step = OptimizerStep(window, optimizer, options.clip_norm, options.clip_value)
        self.step = step if graphs is None else GraphedStep(step, graphs)
        graphed = None if graphs is None else GraphedWindow(window, graphs)
        self.progress = Progress()
        self.batch: Batch | None = None
        self.title = ""
        self.random_state: Callable[[], dict[str, Any]] = random_state
        self._stop_request = StopRequest(window.sync.ranks)
        self.out_of_memory = OutOfMemoryHandler(
            window, options.recover, graphed.backward if graphed else None
        )
        self.log = MetricsLog(
            window, train_metrics, metrics_sink, options.check_finite, self.out_of_memory.steps
        )
        self.latest = self.log.latest
        window.on_discard.append(self.log.train_metrics.discard)
        self.in_step: Sequence[Trainer] = (self,)
        self._events: dict[str, list[Callable[..., None]]] = {}

    @property
    def finished(self) -> bool:
        return self.progress.update >= self.total_updates

    @property
    def publishes(self) -> bool:
        """Whether the next update, in `update_begin` the present one, is published."""
        following = self.progress.update + 1
        return following % self.options.log_every == 0 or following == self.total_updates

    @property
    def stop_reason(self) -> str | None:
        """Why the run ends before its last update, or None; the same on all ranks."""
        return self._stop_request.reason

    @property
    def stop_code(self) -> int:
        """The largest code that `stop` was called with, on any rank; 0 without a request."""
        return self._stop_request.code

    def stop(self, reason: str, code: int = 1, force: bool = False) -> None:
        """Requests that the loop end after this update or evaluation, on several ranks one update later.

        `code` is the number of the signal that requests it, or 1. Where `LoopOptions.may_stop` is false, only
        a request with `force` counts.
        """
        if force or self.options.may_stop:
            self._stop_request.add(reason, code)

    def clear_stop(self) -> None:
        """Drops a request to stop, so that `fit` can go on."""
        self._stop_request.reset()

    def fit(self) -> None:
        """Trains until the last update or a stop request, from wherever `progress` is.

        Raises:
            TrainingError: for a loss of inf or nan with `check_finite`, a model that torch cannot compile, or
                a loss or model of which a window is refused.
        """
        try:
            with closing(self.batches()) as batches:
                for batch in batches:
                    self.update(batch)
        except FrozenLater as error:
            raise TrainingError(str(error)) from error
        except Refused as error:
            raise TrainingError(f"{error.key}: {error}") from error
        except RuntimeError as error:
            if unused := unused_parameters(error, self.model):
                remedy = "with accum=ddp take accum.recover=true or accum.find_unused_parameters=true"
                raise TrainingError(f"{', '.join(unused)}: not used in a window: {remedy}") from error
            if explained := compiler_error(error):
                raise explained from error
            raise

    def batches(self) -> Generator[Batch]:
        """Yields the batch of every update of the run; each update must be made before the next batch.

        Evaluation and the ends of epochs, between two updates, happen before the next batch is yielded.
        """
        self._events = listeners(self.callbacks.values())
        self.log.throughput.resume()
        self.log.throughput.mark(self.progress)
        self._emit("run_begin")
        self._stop_request.now()
        try:
            while not self.stop_reason and not self._ended():
                yield from self._epoch()
        finally:
            self._record_rest()
            self._emit("run_end")

    def _record_rest(self) -> None:
        """Records the losses since the last read, after an error that came before the next one."""
        total = self.window.sync.ranks.sum_if_all_come
        with suppress(Exception):  # of the device, of a loss that is not finite, or because a rank is gone
            self.log.read(self.progress.update, False, None, publish_first=False, total=total)

    def _ended(self) -> bool:
        # A run stopped right after the last update of its last epoch still has that epoch to evaluate.
        return self.finished and self.progress.epoch_update != len(self.splits.train)

    def _epoch(self) -> Generator[Batch]:
        progress = self.progress
        self._emit("epoch_begin")
        self.model.train()
        set_mode([self.optimizer], "train")
        for batch in self.splits.train.epoch(progress.epoch, progress.epoch_update):
            yield batch
            self._stop_request.soon()
            if self.stop_reason or self.finished:
                break
        self.read()
        if self.stop_reason:
            return
        if progress.epoch_update == len(self.splits.train):
            progress.epoch, progress.epoch_update = progress.epoch + 1, 0
        if self.finished or progress.epoch % self.options.eval_every == 0:
            values: dict[str, float] = {}
            for split in self.evaluated_splits:
                values |= self.evaluate(split)
            if values:
                self.log.sink.record(progress.update, values, publish=True)
            if isinstance(self.scheduler, EvaluatedSchedule):
                self.scheduler.evaluated(values)
            self._stop_request.now()
        self._emit("epoch_end")

    def update(self, batch: Batch) -> None:
        """One update on `batch`, this rank's samples of it."""
        self.begin(batch)
        self.finish(self._accumulate(batch))

    def begin(self, batch: Batch) -> None:
        """Begins the update on `batch`; its window comes next."""
        self.batch = batch
        self._emit("update_begin")

    @property
    def observe(self) -> Callable[..., None] | None:
        """Called with outputs and targets of every micro-batch of a window that is published, else None."""
        return self.log.train_metrics.observe if self.publishes else None

    def finish(self, result: WindowResult, done: StepResult | None = None) -> None:
        """Ends the update that `begin` began: optimizer step, schedule and metrics.

        Args:
            done: the result of the optimizer's step, if it is made already.
        """
        progress, publish, batch = self.progress, self.publishes, self.batch
        assert batch is not None
        rates = learning_rates(self.optimizer)
        if done is None:
            with NO_MEMORY_TO_STEP:
                done = self.step(publish)
        step_schedule(self.scheduler, first=progress.update == 0)
        progress.update += 1
        progress.epoch_update += 1
        progress.samples += batch.total
        self.log.add(progress.update, result.loss, done.overflow, rates, result.terms if publish else None)
        if publish:
            first = progress.update <= self.options.log_every
            extra = self.log.measured(progress, done.norm, first, self.optimizer)
            self._emit("measured", extra)
            self.read(extra)
            self._emit("logged", self.latest)
        self._emit("update_end")

    def _accumulate(self, batch: Batch) -> WindowResult:
        if self.window.sync.keeps_gradients:
            self.optimizer.zero_grad(set_to_none=False)
        else:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        following = self.progress.update + 1
        with self.log.activations.measure(self.window, batch, self.progress) as measured:
            result = self.out_of_memory.backward(following, batch, self.observe)
        if not measured:
            self.log.activations.due = following in self.out_of_memory.steps
        return result

    def read(self, extra: Mapping[str, float] | None = None) -> None:
        """Reads and records the losses since the last read; `extra` is published with the newest update's."""
        self.log.read(self.progress.update, self.finished, extra)

    def evaluate(self, split: str) -> dict[str, float]:
        """Loss and metrics of "eval" or "test", as `<split>/<name>`, with what callbacks add."""
        no_memory = NoMemoryFor(f"the evaluation on {split}", "lower data.eval_batch_size")
        with self.off_the_clock(), no_memory, in_eval_mode(self.optimizer):
            self.window.sync.share_buffers()
            batches = self.splits.test if split == "test" else self.splits.eval
            values = {f"{split}/{k}": v for k, v in self.evaluator(self.model, batches).items()}
            if math.isnan(values[f"{split}/loss"]) and not self.window.sync.ranks.rank:
                log.warning("%s/loss is nan: the loss is, or it ignores all targets of data.%s", split, split)
            self._emit("evaluated", split, values)
            values = as_numbers(values)
            self.latest.update(values)
        return values

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        wait_for(self.device)
        for trainer in self.in_step:
            trainer.log.throughput.tick(trainer.progress)
        try:
            yield
        finally:
            wait_for(self.device)
            for trainer in self.in_step:
                trainer.log.throughput.resume()

    def _emit(self, event: str, *arguments: Any) -> None:
        for listener in self._events.get(event, ()):
            listener(self, *arguments)
