"""Callbacks of the training loop.

A callback overrides the events it needs; events that none overrides cost nothing. Values passed to a
callback are numbers on the host. A callback that reads the device in `update_begin` or `update_end` makes
every update wait for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..config.ranges import require
from ..errors import TrainingError

if TYPE_CHECKING:
    from .trainer import Trainer

EVENTS = (
    "run_begin",
    "epoch_begin",
    "update_begin",
    "measured",
    "logged",
    "update_end",
    "evaluated",
    "epoch_end",
    "run_end",
)


@dataclass(frozen=True)
class RunState:
    """The open run, for callbacks that save.

    Attributes:
        folder: the run's folder.
        identity: further content of its checkpoints.
        before_save: called before a checkpoint is written.
        saved: whether the present state of the trainer is saved already.
    """

    folder: Path
    identity: dict[str, Any]
    before_save: Callable[[], None]
    saved: bool = False


class Callback:
    """Base of all callbacks, in the order in which events happen.

    An event reaches callbacks of a smaller `order` first: those that add values (EMA) before those that
    act on them, and the one that saves the others' state (checkpoints) last.

    Attributes:
        shows: whether it shows the run on the terminal. Trials and proofs of a run leave it out, and many
            runs in one loop share the first one's.
        saves: whether it writes files. Trials and proofs of a run leave it out.
        evaluates: names of the values that it adds to every evaluation, which `monitor` may be one of.
    """

    order = 0
    evaluates: tuple[str, ...] = ()
    shows = False
    saves = False

    def check(self, trainer: Trainer, key: str) -> None:
        """Called before the run is opened.

        Args:
            key: of this callback in the configuration, such as "callbacks.ema".

        Raises:
            UsageError: naming `key`, if the callback cannot work in this run.
        """

    def run_opened(self, trainer: Trainer, run: RunState) -> None:
        """Called when the run's folder and record are open, before `run_begin`."""

    def run_begin(self, trainer: Trainer) -> None: ...

    def epoch_begin(self, trainer: Trainer) -> None: ...

    def update_begin(self, trainer: Trainer) -> None:
        """Before the window of `trainer.batch`, which is published if `trainer.publishes`."""

    def measured(self, trainer: Trainer, values: dict[str, float]) -> None:
        """After the optimizer's step of an update that is published, every `trainer.log_every` updates.

        Entries added to `values` are logged. The device may be read here.
        """

    def logged(self, trainer: Trainer, values: dict[str, float]) -> None:
        """After the metrics of a published update were read, every `trainer.log_every` updates."""

    def update_end(self, trainer: Trainer) -> None:
        """After the optimizer's step; `trainer.stop(reason)` ends the run after this update."""

    def evaluated(self, trainer: Trainer, split: str, values: dict[str, float]) -> None:
        """After the evaluation of `split`, "eval" or "test"; entries added to `values` are logged."""

    def epoch_end(self, trainer: Trainer) -> None: ...

    def run_end(self, trainer: Trainer) -> None:
        """After the loop: finished, stopped or failed."""

    def state_dict(self) -> dict[str, Any]:
        """The state to save: numbers, strings, lists, dicts and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def without_output(callbacks: Mapping[str, Callback]) -> dict[str, Callback]:
    """`callbacks` without those that show the run or save it."""
    return {name: c for name, c in callbacks.items() if not (c.shows or c.saves)}


def listeners(callbacks: Iterable[Callback]) -> dict[str, list[Callable[..., None]]]:
    """By event, the methods that override it, those of a smaller `order` first."""
    ordered = sorted(callbacks, key=lambda callback: callback.order)
    return {
        event: [getattr(c, event) for c in ordered if getattr(type(c), event) is not getattr(Callback, event)]
        for event in EVENTS
    }


class Best:
    """Tracks the best value of `monitor`; `mode` is "max" or "min"."""

    def __init__(self, monitor: str, mode: str, min_delta: float = 0.0) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode={mode}: max or min")
        self.monitor = monitor
        self.split = monitor.partition("/")[0]
        self.mode = mode
        self.sign = 1.0 if mode == "max" else -1.0
        self.min_delta = min_delta
        self.value: float | None = None

    def improved(self, values: dict[str, float]) -> bool:
        value = values.get(self.monitor, math.nan)
        if not math.isfinite(value):
            return False
        if self.value is not None and self.sign * (value - self.value) <= self.min_delta:
            return False
        self.value = value
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.value, "monitor": self.monitor, "mode": self.mode}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the best value, unless it is one of another metric or mode."""
        same = state.get("monitor", self.monitor), state.get("mode", self.mode)
        if same == (self.monitor, self.mode):
            if not isinstance(state["best"], int | float | None):
                raise TypeError(f"the best value is a {type(state['best']).__name__}")
            self.value = state["best"]


class EarlyStopping(Callback):
    """Stops after `patience` evaluations in which `monitor` did not improve by more than `min_delta`."""

    def __init__(
        self, patience: int = 5, min_delta: float = 0.0, monitor: str = "eval/accuracy", mode: str = "max"
    ) -> None:
        require("patience", patience, at_least=1, at_most=2**31 - 1, whole=True)
        require("min_delta", min_delta, at_least=0)
        self.patience = patience
        self.best = Best(monitor, mode, min_delta)
        self.waited = 0

    def evaluated(self, trainer: Trainer, split: str, values: dict[str, float]) -> None:
        if split != self.best.split:
            return
        self.waited = 0 if self.best.improved(values) else self.waited + 1
        if self.waited >= self.patience and not (split == "test" and trainer.finished):
            trainer.stop(f"early stopping: {self.best.monitor} did not improve in {self.waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        return {**self.best.state_dict(), "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best.load_state_dict(state)
        self.waited = state["waited"] if self.best.value is not None else 0


class EMA(Callback):
    """Keeps an exponential moving average of the weights, updated once an update, and evaluates it.

    Logs `ema_<metric>` of each split.
    """

    order = -1

    def __init__(self, decay: float = 0.99) -> None:
        require("decay", decay, at_least=0, below=1)
        self.decay = decay
        self.average: AveragedModel | None = None
        self._state: dict[str, Any] | None = None

    def run_begin(self, trainer: Trainer) -> None:
        self.average = AveragedModel(trainer.model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        if self._state:
            try:
                self.average.load_state_dict(self._state)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:300]
                raise TrainingError(
                    f"the checkpoint's average of the weights does not fit: {reason}"
                ) from error

    def update_end(self, trainer: Trainer) -> None:
        assert self.average is not None
        self.average.update_parameters(trainer.model)

    def evaluated(self, trainer: Trainer, split: str, values: dict[str, float]) -> None:
        assert self.average is not None
        batches = trainer.splits.test if split == "test" else trainer.splits.eval
        trainer.window.sync.share_buffers(self.average)
        averaged = trainer.evaluator(self.average, batches)
        values.update({f"{split}/ema_{name}": value for name, value in averaged.items()})

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict() if self.average else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = {name: torch.as_tensor(value) for name, value in state.items()}
