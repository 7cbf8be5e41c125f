"""Sharded checkpoints of fully sharded models: every rank writes and reads its own shards.

torch.distributed.checkpoint reshards when it loads: any number of ranks, or one process, can read what
others wrote. Its import takes as long as half of torch, so it is imported where it is used.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
import zipfile
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
    """The folder with the shards of checkpoint `path`, None if the checkpoint is not sharded.

    Raises:
        UsageError: if the folder is missing.
    """
    if not content.get(KEY):
        return None
    name = content[KEY]
    if not isinstance(name, str) or Path(name).name != name:
        raise UsageError(f"checkpoint {path}: {name!r} is no folder of its parts")
    folder = path.parent / name
    if not (folder / ".metadata").is_file():
        raise UsageError(f"checkpoint {path}: its parts are not in {folder}; move both together")
    return folder


def save(trainer: Trainer, path: Path) -> str:
    """Writes this rank's shards of model and optimizer beside checkpoint `path`; all ranks must call.

    Returns:
        The folder's name. The folder is renamed to it after all ranks have written.
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
    """Reads this rank's shards of model and optimizer from `folder`; all ranks must call."""
    import torch.distributed.checkpoint.state_dict_loader as loader
    from torch.distributed.checkpoint.state_dict import set_state_dict

    from .shard_reader import Reader, SafeLoadPlanner

    with _quiet():
        state = _state(trainer)
        loader.load(state, storage_reader=Reader(folder), planner=SafeLoadPlanner())
        set_state_dict(
            trainer.model,
            trainer.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def load_model(model: nn.Module, folder: Path) -> None:
    """Reads the whole model from `folder`, in one process."""
    import torch.distributed.checkpoint.state_dict_loader as loader

    from .shard_reader import Reader, SafeLoadPlanner

    state = {"model": model.state_dict()}
    with _quiet():
        loader.load(state, storage_reader=Reader(folder), planner=SafeLoadPlanner(), no_dist=True)
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
    """Hides torch's own deprecation warnings; raises RuntimeError instead of CheckpointException."""
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable or uninit")
        try:
            yield
        except CheckpointException as error:  # which is a BaseException
            raise RuntimeError("; ".join(f"rank {r}: {e[0]}" for r, e in error.failures.items())) from error
        except (pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
            raise RuntimeError(f"the parts are damaged: {error}") from error
