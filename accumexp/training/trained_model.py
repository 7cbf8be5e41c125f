"""The model of a checkpoint, with its trained weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from ..config.trust import Trust
from ..environment.ranks import RankInfo
from ..errors import UsageError
from ..tracking.run_folder import BEST
from ..tracking.stored_models import is_stored, stored_checkpoints
from . import shards
from .checkpoint import DAMAGED, find, load, saved_updates
from .checkpoint_parts import configuration
from .components import build_model, placement
from .optimizers import in_eval_mode
from .restorable import check_kinds

if TYPE_CHECKING:
    from .trainer import Trainer


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

    Returns:
        The model. Its attribute `accumexp_config` is the configuration that it was trained with.

    Raises:
        UsageError: if there is no checkpoint, it names a class that is not trusted, or it does not fit its
            configuration.
    """
    path = find(where, best)
    return model_of(load(path), path, trust)


def model_of(content: Mapping[str, Any], path: Path, trust: Any = False) -> nn.Module:
    """The model of the checkpoint `content`, which was read from `path`; otherwise as `load_model`."""
    alone = ["accum.strategy=standalone", "accum.processes=1", "device=cpu"]
    config = configuration(content, path, alone, replace(Trust.given(trust), in_python=True))
    model = build_model(config).to(placement(config, RankInfo()).dtype)
    load_weights(model, content, path)
    model.accumexp_config = config  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return model.eval()


def load_trained(
    where: str | Path, which: Literal["best", "last"] = "best", trust: Any = False, uri: str = ""
) -> nn.Module:
    """The model that a run has trained, in eval mode, on the CPU; public as `accumexp.load`.

    Args:
        where: a run's folder, a checkpoint, the id of a run in MLflow, or a model in it, `models:/...`.
        which: of a run, the checkpoint with the best value of its `monitor`, or the last one. A run without
            an eval split has only the last.
        trust: packages whose classes its configuration may name besides those that the project knows, such
            as `["my_package"]`, or True for any class at all: for checkpoints of your own.
        uri: the store of a run or model in MLflow, by default that of `mlflow.set_tracking_uri`, of
            MLFLOW_TRACKING_URI, or `mlflow.db` in this folder.

    Returns:
        The model. Its attribute `accumexp_config` is the configuration that it was trained with.

    Raises:
        UsageError: if there is no such run or checkpoint, it names a class that is not trusted, or it does
            not fit its configuration.
    """
    path = checkpoint_of(where, which, uri)
    return model_of(load(path), path, trust)


def best_values(trainer: Trainer, best: Path, last: Mapping[str, float]) -> dict[str, float]:
    """Loss and metrics of the best checkpoint's model on the test split.

    All ranks must call. Empty where there is no such checkpoint, a rank cannot read it, or the model is in
    shards. The model has its own weights again afterwards.

    Args:
        best: the path of the checkpoint.
        last: the values of the present model, which may be the best one.
    """
    ranks = trainer.window.sync.ranks
    if ranks.largest([not best.is_file()])[0] or trainer.window.sync.sharded:
        return {}
    content, model = load(best, in_file=True), trainer.model
    if content["progress"]["update"] == trainer.progress.update:
        return dict(last)
    with trainer.off_the_clock(), in_eval_mode(trainer.optimizer):
        last_state = {name: _copied(value) for name, value in model.state_dict().items()}
        try:
            model.load_state_dict(content["model"])
            return trainer.evaluator(model, trainer.splits.test)
        finally:
            model.load_state_dict(last_state)


def _copied(value: Any) -> Any:
    return value.to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def checkpoint_of(where: str | Path, which: str = "best", uri: str = "") -> Path:
    """The checkpoint that `where` and `which` name, as in `load_trained`."""
    if which not in ("best", "last"):
        raise UsageError(f"which={which}: best or last")
    if Path(where).exists() or not is_stored(str(where)):
        return find(where, which == "best")
    folder = stored_checkpoints(str(where), uri, which == "best")
    if which == "best" or folder.is_file():
        return find(folder, best=True)
    # The store has a checkpoint once: the last one may be there as the best.
    best = folder / BEST
    kept = [*saved_updates(folder), *([best] if best.is_file() else [])]
    return max(kept, key=lambda path: load(path, True)["progress"]["update"]) if kept else find(folder)
