"""Checkpoints of a model that no process holds whole: every rank writes and reads its own part.

torch.distributed.checkpoint names each tensor by its parameter and knows where its parts lie, so what
some ranks wrote, any other number of ranks, or one process, can read. It is imported where it is used:
that takes as long as half of torch.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from ..errors import UsageError

if TYPE_CHECKING:
    from .trainer import Trainer

SUFFIX = ".shards"
KEY = "shards"


def folder_of(path: Path, content: Mapping[str, Any]) -> Path | None:
    """The folder of the parts of checkpoint `path`, None if it holds all there is itself.

    Raises:
        UsageError: if it is not there.
    """
    if not content.get(KEY):
        return None
    folder = path.parent / content[KEY]
    if not (folder / ".metadata").is_file():
        raise UsageError(f"checkpoint {path}: its parts are not in {folder}; move both together")
    return folder


def save(trainer: Trainer, path: Path) -> str:
    """Writes the parts of model and optimizer beside checkpoint `path`; all ranks must call.

    Returns:
        The folder's name, which it has only once it is whole.
    """
    import torch.distributed.checkpoint.state_dict_saver as saver

    folder = path.with_suffix(SUFFIX)
    partial = path.with_name(f".{folder.name}.partial")
    first = trainer.window.sync.ranks.rank == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    _wait(trainer)
    with _quiet():
        saver.save(_state(trainer), checkpoint_id=partial)
    if first:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    _wait(trainer)
    return folder.name


def load(trainer: Trainer, folder: Path) -> None:
    """Reads this process's parts of model and optimizer from `folder`; all ranks must call."""
    import torch.distributed.checkpoint.state_dict_loader as loader
    from torch.distributed.checkpoint.state_dict import set_state_dict

    with _quiet():
        state = _state(trainer)
        loader.load(state, checkpoint_id=folder)
        set_state_dict(
            trainer.model,
            trainer.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def load_model(model: nn.Module, folder: Path) -> None:
    """Reads the whole model from `folder`, in one process."""
    import torch.distributed.checkpoint.state_dict_loader as loader

    state = {"model": model.state_dict()}
    with _quiet():
        loader.load(state, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(state["model"])


def _state(trainer: Trainer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, optimizer = get_state_dict(trainer.model, trainer.optimizer)
    return {"model": model, "optimizer": optimizer}


def _wait(trainer: Trainer) -> None:
    if trainer.window.sync.ranks.size > 1:
        dist.barrier(trainer.window.sync.ranks.group)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's own deprecations and its advice to a single process; failures as RuntimeError."""
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninit")
        try:
            yield
        except CheckpointException as error:  # a BaseException, which nobody expects
            raise RuntimeError("; ".join(f"rank {r}: {e[0]}" for r, e in error.failures.items())) from error
