"""The model of a checkpoint, with its trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..config.trust import Trust
from ..environment.ranks import RankInfo
from ..errors import UsageError
from . import shards
from .checkpoint import DAMAGED, find, load
from .checkpoint_parts import configuration
from .components import build_model, placement
from .restorable import check_kinds


def load_weights(model: nn.Module, content: Mapping[str, Any], path: Path) -> None:
    """Loads the weights of the checkpoint `content`, read from `path`, into `model`.

    Raises:
        UsageError: if they are of another shape.
    """
    parts = shards.folder_of(path, content)
    try:
        if parts is None:
            check_kinds(model, content["model"])
            model.load_state_dict(content["model"])
        else:
            shards.load_model(model, parts)
    except DAMAGED as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"checkpoint {path}: does not fit this configuration: {reason}") from error


def load_model(where: str | Path, best: bool = True, trust: Any = False) -> nn.Module:
    """The model of a checkpoint in eval mode, on the CPU, in the dtype that it was trained in.

    Args:
        where: a checkpoint, or a run's folder.
        best: of a folder the best checkpoint, else the newest.
        trust: packages whose classes its configuration may name besides those that the project knows, or
            True for any class at all: for checkpoints of your own.

    Raises:
        UsageError: if there is no checkpoint, it names a class that is not trusted, or it does not fit its
            configuration.
    """
    path = find(where, best)
    content = load(path)
    alone = ["accum.strategy=standalone", "accum.processes=1", "device=cpu"]
    config = configuration(content, path, alone, Trust.given(trust))
    model = build_model(config).to(placement(config, RankInfo()).dtype)
    load_weights(model, content, path)
    return model.eval()
