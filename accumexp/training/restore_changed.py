"""What a resumed run takes from its changed configuration instead of from the checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..errors import UsageError
from .checkpoint import restore
from .trainer import Trainer

# Changes of these give the optimizer's groups other settings.
SCHEDULE = ("scheduler.", "data.batch_size", "data.drop_last", "trainer.epochs", "trainer.max_updates")
RATE = ("optimizer.lr", "scheduler.")
SCALE = ("accum.loss_scale", "accum.init_scale")


def restore_changed(
    trainer: Trainer, content: Mapping[str, Any], path: Path, changed: Iterable[str] = ()
) -> None:
    """Restores a checkpoint into a `trainer` that is new and was built from a changed configuration.

    If settings of the optimizer, its schedule or the run's length are among the `changed` keys, the schedule
    is stepped from its beginning to the checkpoint's update, and gives the groups their settings. A changed
    loss scale begins at its initial value.

    Raises:
        UsageError: if the checkpoint does not fit, or a schedule depends on more than the number of updates.
    """
    keys = list(changed)
    settings: list[dict[str, Any]] = []
    evaluated = _follows_evaluations(trainer.scheduler)
    if evaluated and (key := next((key for key in keys if key in ("monitor", "mode")), None)):
        raise UsageError(
            f"{key}: the schedule follows the metric that was evaluated; begin a new run with it"
        )
    if any(key.startswith(("optimizer.", *SCHEDULE)) for key in keys):
        if evaluated:
            if rate := next((key for key in keys if key.startswith((*RATE, "optimizer.groups"))), None):
                name = type(getattr(trainer.scheduler, "scheduler", trainer.scheduler)).__name__
                raise UsageError(f"{rate}: {name} follows what was evaluated; begin a new run with it")
            settings = _settings(trainer, without=("lr", "initial_lr"))
        else:
            _forward(trainer.scheduler, content["progress"]["update"])
            settings = _settings(trainer)
            content = {**content, "scheduler": trainer.scheduler.state_dict()}
    scale = trainer.window.loss_scale
    initial = None if scale is None or not any(key in SCALE for key in keys) else scale.scale.clone()
    restore(trainer, content, path)
    for group, entries in zip(trainer.optimizer.param_groups, settings, strict=False):
        group.update(entries)
    if scale is not None and initial is not None:
        scale.scale.copy_(initial)


def _follows_evaluations(schedule: Any) -> bool:
    return not isinstance(schedule, LRScheduler) or isinstance(schedule, ReduceLROnPlateau)


def _forward(schedule: Any, updates: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(updates):
            schedule.step()


def _settings(trainer: Trainer, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The settings of each of the optimizer's groups."""
    left_out = {"params", *without}
    groups = trainer.optimizer.param_groups
    return [{key: value for key, value in group.items() if key not in left_out} for group in groups]
