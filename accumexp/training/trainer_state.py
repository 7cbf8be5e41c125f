"""The state of a trainer that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..accum import rates_as_numbers
from .progress import Progress
from .restorable import check_kinds, check_optimizer, check_state

if TYPE_CHECKING:
    from .trainer import Trainer


def trainer_state(trainer: Trainer) -> dict[str, Any]:
    """All that the next update depends on, except the random state and the order of samples.

    Model and optimizer of a fully sharded model are left out: `shards` saves them.
    """
    trainer.read()
    scale = trainer.window.loss_scale
    whole = not trainer.window.sync.sharded
    return {
        "progress": asdict(trainer.progress),
        "steps": trainer.window.steps,
        "model": trainer.model.state_dict() if whole else {},
        "optimizer": rates_as_numbers(trainer.optimizer.state_dict()) if whole else {},
        "scheduler": trainer.scheduler.state_dict(),
        "loss_scale": {} if scale is None else scale.state_dict(),
        "shortage": trainer.out_of_memory.state_dict(),
        "callbacks": {name: callback.state_dict() for name, callback in trainer.callbacks.items()},
    }


def restore_trainer_state(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Restores a `trainer_state`. What fails if it does not fit is any of `checkpoint.DAMAGED`."""
    if state["model"]:
        check_kinds(trainer.model, state["model"])
        trainer.model.load_state_dict(state["model"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        check_optimizer(trainer.optimizer)
    check_state(trainer.scheduler.state_dict(), state["scheduler"])
    trainer.scheduler.load_state_dict(state["scheduler"])
    if trainer.window.loss_scale is not None and state.get("loss_scale"):
        trainer.window.loss_scale.load_state_dict(state["loss_scale"])
    if state.get("shortage"):
        trainer.out_of_memory.load_state_dict(state["shortage"])
    for name, callback in trainer.callbacks.items():
        if state["callbacks"].get(name):
            check_state(callback.state_dict(), state["callbacks"][name], f"callbacks.{name}")
            callback.load_state_dict(state["callbacks"][name])
    trainer.progress = Progress(**state["progress"])
    trainer.total_updates = trainer.options.total_updates(len(trainer.splits.train), trainer.progress)
    trainer.log.activations.due = not trainer.progress.update or state.get("steps") != trainer.window.steps
