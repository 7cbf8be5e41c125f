"""Replays a loop's updates: torch's own optimizer and schedule on the loop's gradients, update by update.

Every update is compared from the weights that the loop had before it, so rounding does not grow.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from .certificate import Check, excess
from .float64 import keep_float64
from .larger_batch import dense, relative_error
from .nested import batch_size
from .observation import Observation
from .problem import Problem, TrainingState, WholeBatch, copy_in, unsharded
from .ranks import all_gather
from .rounding import roundoff

BITS = "the same arithmetic on the same gradient: not a bit may differ"
ONE_STEP = "one step of the optimizer a window"
# In unit roundoffs: kernels on shards of a parameter differ from those on the whole.
SHARDED = 8.0
Key = TypeVar("Key")


class Replay(ABC):
    """Compares a loop's updates with the larger batch's and keeps the worst figure of every comparison.

    Args:
        state: of the loop before its first update.
        dtype: of the comparison.

    Attributes:
        model, optimizer, schedule: of the replay; they take over the loop's values after every update.
        updates: number of updates that were compared.
        diverged: whether the larger batch itself left the precision's range; no more updates are compared.
    """

    def __init__(self, problem: Problem, state: TrainingState, dtype: torch.dtype) -> None:
        self.problem = problem
        self.state = state
        self.dtype = dtype
        self.model = copy_in(problem.model, dtype)
        self.optimizer = problem.optimizer(list(self.model.parameters()))
        self.schedule = problem.scheduler(self.optimizer) if problem.scheduler else None
        self.updates = 0
        self.diverged = False
        self._full = 0
        self._worst: dict[str, tuple[float, int, str]] = {}

    @abstractmethod
    def compare(self, batch: WholeBatch, observation: Observation) -> None:
        """Compares the update that the loop has just made on `batch`. A collective call."""

    def _is_smaller(self, batch: WholeBatch) -> bool:
        """Whether `batch` has fewer samples than one before."""
        self._full = max(self._full, batch_size(batch))
        return batch_size(batch) < self._full

    def _step_optimizer(self, observation: Observation) -> None:
        """Steps the replay's optimizer on the gradient that the loop's received."""
        if observation.gradient is None:
            return
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                gradient = observation.received.get(name, observation.gradient.get(name))
                gradient = None if name in observation.absent else gradient
                parameter.grad = None if gradient is None else gradient.to(parameter)
        _begin_momentum(self.optimizer)
        with keep_float64(
            self.dtype, self.problem.narrowing
        ):  # torch's optimizers count steps in the default dtype
            self.optimizer.step()

    def _step_schedule(self) -> None:
        if self.schedule is not None:
            with warnings.catch_warnings():
                # Expected after windows that the loop skipped.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self.schedule.step()

    def _take_over(self) -> tuple[dict[str, float], dict[tuple[Any, str], float]]:
        """Takes over the loop's values and buffers; returns errors of parameters and of optimizer state."""
        parameters = _take_over(self.state.parameters(), dict(self.model.named_parameters()))
        optimizer = _take_over(tensors_of(self.state.optimizer), tensors_of(self.optimizer))
        _take_over(self.state.buffers(), dict(self.model.named_buffers()))
        return parameters, optimizer

    def _record(self, name: str, figure: float, where: str = "") -> None:
        if name not in self._worst or not figure <= self._worst[name][0]:
            self._worst[name] = (figure, self.updates, where)

    def _check(self, title: str, name: str, bound: float, why: str, unit: str = "relative") -> Check:
        """The check of the worst figure recorded as `name`. A collective call."""
        figures = all_gather(self._worst.get(name, (0.0, 0, "")))
        figure, update, where = max(figures, key=lambda entry: excess(entry[0], 1.0))
        detail = f"off in update {update}{where}" if figure else "no difference"
        return Check(title, figure, bound, unit, why, detail)

    @property
    def _bit_bound(self) -> float:
        sharded = any(hasattr(p, "full_tensor") for p in self.state.parameters().values())
        return SHARDED * roundoff(self.dtype) if sharded else 0.0


def _begin_momentum(optimizer: Any) -> None:
    """Gives a buffer of zeros to each parameter whose first gradient comes after the first update.

    torch's fused SGD fails on it; with zeros the parameter's first step is that of plain SGD.
    """
    for group in optimizer.param_groups:
        if not (group.get("fused") and group.get("momentum")) or group.get("dampening"):
            continue
        for parameter in group["params"]:
            if parameter.grad is not None and optimizer.state:
                state = optimizer.state[parameter]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)


def _take_over(actual: Mapping[Key, Tensor], expected: Mapping[Key, Tensor]) -> dict[Key, float]:
    errors = {}
    for key, tensor in expected.items():
        if key not in actual:
            errors[key] = math.inf
            continue
        value = unsharded(actual[key].detach())
        errors[key] = relative_error(value, tensor)
        if errors[key] and value.shape == tensor.shape:
            with torch.no_grad():
                tensor.copy_(value if tensor.is_sparse else dense(value))
    return errors


def tensors_of(optimizer: Any) -> dict[tuple[Any, str], Tensor]:
    """The tensors in an optimizer's state, by parameter number and name."""
    return {
        (number, name): value
        for number, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }
