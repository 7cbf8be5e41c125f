"""The loop, and nothing else: what is trained, logged and saved is handed to it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from .accum import Window, WindowResult, measure_activations, steps_for, tensors
from .callbacks import Callback
from .data import Batch, Splits
from .errors import TrainingError
from .evaluation import Evaluator, WindowMetrics
from .system import MIB, peak_memory_mib, wait_for

EVENTS = (
    "run_begin",
    "epoch_begin",
    "update_begin",
    "update_end",
    "logged",
    "evaluated",
    "epoch_end",
    "run_end",
)


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
            clip the gradient, step the optimizer, step the schedule
            every log_every updates: read the device, log
        evaluate on the eval split

    Everything in the inner loop happens once an update, whatever the number of micro-batches, and
    nothing in it waits for the device but the read every `log_every` updates.

    Args:
        window: accumulates a batch's gradient into the model's parameters.
        train_metrics: torchmetrics over the windows of logged updates.
        epochs, max_updates: the run ends at whichever comes first.
        log_every: updates between two reads of the device.
        eval_every: epochs between two evaluations; the last is always evaluated.
        clip_norm: the 2-norm that the update's gradient is clipped to, or None.
        check_finite: fail on a loss that is inf or nan.
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
        self.clip_norm = clip_norm
        self.check_finite = check_finite
        self.progress = Progress()
        self.stop_reason: str | None = None
        self.latest: dict[str, float] = {}
        self._pending: list[tuple[int, Tensor, float]] = []  # update, loss on the device, learning rate
        self._clock = time.perf_counter()
        self._last_read = (0, 0, 0.0)  # update, samples, seconds
        self._events: dict[str, list[Callable[..., None]]] = {}

    @property
    def finished(self) -> bool:
        return self.progress.update >= self.total_updates

    def stop(self, reason: str) -> None:
        """Asks the loop to end: after this update, or after the evaluation it is in."""
        self.stop_reason = reason

    def fit(self) -> None:
        """Trains until the last update or a stop request, from wherever `progress` is.

        Raises:
            TrainingError: with `check_finite`, for a loss that is inf or nan.
        """
        self._events = {event: self._listeners(event) for event in EVENTS}
        self._clock = time.perf_counter()
        self._mark_read()
        self._emit("run_begin")
        try:
            while not self.stop_reason and not self._ended():
                self._epoch()
        finally:
            self._emit("run_end")

    def _ended(self) -> bool:
        # A run stopped right after the last update of its last epoch still has that epoch to evaluate.
        return self.finished and self.progress.epoch_update != len(self.splits.train)

    def _epoch(self) -> None:
        progress = self.progress
        self._emit("epoch_begin")
        self.model.train()
        for batch in self.splits.train.epoch(progress.epoch, progress.epoch_update):
            self._update(batch)
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
        self._emit("epoch_end")

    def _update(self, batch: Batch) -> None:
        progress = self.progress
        publish = (progress.update + 1) % self.log_every == 0 or progress.update + 1 == self.total_updates
        self._emit("update_begin")
        self.optimizer.zero_grad(set_to_none=True)
        result = self._accumulate(batch, self.train_metrics.observe if publish else None)
        norm = self._clip(publish)
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.scheduler.step()
        progress.update += 1
        progress.epoch_update += 1
        progress.samples += result.samples
        self._pending.append((progress.update, result.loss, rate))
        if publish:
            self._publish(norm)
        self._emit("update_end")

    def _accumulate(self, batch: Batch, observe: Callable[..., None] | None) -> WindowResult:
        steps = steps_for(len(batch.indices), self.splits.train.batch_size, self.window.steps)
        if self.progress.update:
            return self.window.backward(batch.inputs, batch.targets, steps=steps, observe=observe)
        with measure_activations(self.model, [*tensors(batch.inputs), *tensors(batch.targets)]) as saved:
            result = self.window.backward(batch.inputs, batch.targets, steps=steps, observe=observe)
        self.progress.activation_bytes = saved.peak_bytes
        return result

    def _clip(self, publish: bool) -> Tensor | None:
        """The gradient's 2-norm before clipping, where it is needed."""
        if self.clip_norm is None and not publish:
            return None
        limit = math.inf if self.clip_norm is None else self.clip_norm
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), limit, norm)
        return norm

    def read(self, extra: Mapping[str, float] | None = None) -> None:
        """Reads the losses since the last read in one wait for the device, and records them.

        `extra` belongs to the newest update and makes it a published one.
        """
        if not self._pending:
            return
        losses = torch.stack([loss for _, loss, _ in self._pending]).tolist()
        newest = self._pending[-1][0]
        for (update, _, rate), loss in zip(self._pending, losses, strict=True):
            if self.check_finite and not math.isfinite(loss):
                raise TrainingError(
                    f"train/loss is {loss} at update {update}: lower optimizer.lr, set "
                    "trainer.clip_norm, or go on regardless with trainer.check_finite=false"
                )
            values = {"train/loss": loss, "train/lr": rate}
            publish = extra is not None and update == newest
            if publish:
                values.update(extra or {})
                self.latest.update(values)
            self.recorder.record(update, values, publish)
        self._pending.clear()

    def _publish(self, norm: Tensor | None) -> None:
        extra: dict[str, float] = {} if norm is None else {"train/grad_norm": float(norm)}
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
        self.read(extra)
        self._emit("logged", self.latest)

    def evaluate(self, split: str) -> dict[str, float]:
        """Loss and metrics of "eval" or "test", as `<split>/<name>`, with what callbacks add."""
        with self.off_the_clock():
            batches = self.splits.test if split == "test" else self.splits.eval
            values = {f"{split}/{k}": v for k, v in self.evaluator(self.model, batches).items()}
            self._emit("evaluated", split, values)
            self.latest.update(values)
        return values

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Time spent inside does not count as training."""
        wait_for(self.device)
        self._tick()
        try:
            yield
        finally:
            wait_for(self.device)
            self._clock = time.perf_counter()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._clock
        self._clock = now

    def _mark_read(self) -> None:
        self._last_read = (self.progress.update, self.progress.samples, self.progress.seconds)

    def _listeners(self, event: str) -> list[Callable[..., None]]:
        base = getattr(Callback, event)
        callbacks = sorted(self.callbacks.values(), key=lambda callback: callback.order)
        return [getattr(c, event) for c in callbacks if getattr(type(c), event, base) is not base]

    def _emit(self, event: str, *arguments: Any) -> None:
        for listener in self._events.get(event, ()):
            listener(self, *arguments)

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on, but the random state and the samples' order."""
        self.read()
        return {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "callbacks": {name: callback.state_dict() for name, callback in self.callbacks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to where `state_dict` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        for name, callback in self.callbacks.items():
            if state["callbacks"].get(name):
                callback.load_state_dict(state["callbacks"][name])
        self.progress = Progress(**state["progress"])


def total_updates(updates_per_epoch: int, epochs: int, max_updates: int | None) -> int:
    """Updates in a run."""
    every = updates_per_epoch * epochs
    return every if max_updates is None else min(every, max_updates)
