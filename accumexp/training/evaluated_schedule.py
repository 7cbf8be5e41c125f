"""Schedules that are stepped with an evaluated value, and those that no update can step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hydra.utils import get_object
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..errors import UsageError
from .callbacks import Best, Callback
from .optimizers import required_arguments


class EvaluatedSchedule:
    """Steps a `ReduceLROnPlateau` with `monitor` once an evaluation, and not with updates."""

    def __init__(self, scheduler: ReduceLROnPlateau, monitor: str) -> None:
        self.scheduler = scheduler
        self.monitor = monitor

    def step(self) -> None:
        """After an update: nothing."""

    def evaluated(self, values: Mapping[str, float]) -> None:
        self.scheduler.step(values[self.monitor])

    def get_last_lr(self) -> list[Any]:
        return [group["lr"] for group in self.scheduler.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)


def evaluated_splits(has_eval: bool, scheduler: Any, callbacks: Iterable[Callback]) -> list[str]:
    """What to evaluate at the ends of epochs: "eval" if there is one, and "test" where it is monitored."""
    bests = (getattr(callback, "best", None) for callback in callbacks)
    monitors = [best.monitor for best in bests if isinstance(best, Best)]
    if isinstance(scheduler, EvaluatedSchedule):
        monitors.append(scheduler.monitor)
    on_test = any(monitor.startswith("test/") for monitor in monitors)
    return ["eval"] * has_eval + ["test"] * on_test


def takes_metric(node: Mapping[str, Any]) -> bool:
    """Whether the class of `node` is a `ReduceLROnPlateau`."""
    try:
        target = get_object(str(node.get("_target_")))
    except Exception:  # reported where it is built
        return False
    return isinstance(target, type) and issubclass(target, ReduceLROnPlateau)


def steppable(scheduler: Any, target: str, monitor: str) -> Any:
    """`scheduler` as the loop steps it.

    Raises:
        UsageError: if its step needs arguments that the loop does not have.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        return EvaluatedSchedule(scheduler, monitor)
    if not callable(getattr(scheduler, "step", None)):
        raise UsageError(f"scheduler._target_={target}: has no step, a learning rate scheduler is needed")
    if needed := required_arguments(scheduler.step):
        raise UsageError(
            f"scheduler._target_={target}: its step needs {', '.join(needed)}; take one that is stepped "
            "without arguments, or a subclass of ReduceLROnPlateau, which gets the value of monitor"
        )
    return scheduler
