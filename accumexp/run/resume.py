"""`resume=`: the run whose checkpoint is resumed, with its own configuration and the command's overrides."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..config.schema import Config, from_hydra
from ..environment.ranks import launched_rank
from ..errors import UsageError
from ..tracking.folder import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """A run to resume: its configuration, and the content of its checkpoint.

    Attributes:
        overrides: those of the command that resumes it.
    """

    config: Config
    content: dict[str, Any]
    path: Path
    overrides: list[str]

    @property
    def update(self) -> int:
        return self.content["progress"]["update"]

    @property
    def ended_by(self) -> str | None:
        """Why a callback ended it before its last update; None if overrides may ask for more updates."""
        return None if self.overrides else self.content.get("ended_by")

    def tags(self) -> dict[str, str]:
        return {f"accumexp.resumed.{self.update}": " ".join(self.overrides) or "unchanged"}

    def __reduce__(self) -> Any:
        # Another process reads the checkpoint again instead of receiving its tensors.
        return _read_again, (self.config, self.path, self.overrides)


def _read_again(config: Config, path: Path, overrides: list[str]) -> Resumed:
    from ..training.checkpoint import load

    return Resumed(config, load(path), path, overrides)


def resume_job(path: Path) -> Resumed:
    """The job of a sweep that wrote the checkpoint `path`, with its own configuration."""
    from ..training.checkpoint import load

    content = load(path)
    return Resumed(changed(content["config"], []), content, path, [])


def resumed(cfg: DictConfig) -> Resumed | None:
    """What `cfg.resume` names, with this command's other overrides on top; None if it names nothing.

    A run whose newest checkpoint is damaged goes on from the one before, and says so.

    Raises:
        UsageError: if there is no readable checkpoint, the run is finished, or an override changes what
            updates already logged would have been.
    """
    if not cfg.resume:
        return None
    from hydra.core.hydra_config import HydraConfig

    from ..tracking.journal import last_update
    from ..training.checkpoint import find, load

    where = Path(str(cfg.resume))
    path = find(where)
    try:
        content = load(path)
    except UsageError:
        older = _older(path) if where.is_dir() else None
        if older is None:
            raise
        log.warning("checkpoint %s is damaged, going on from %s", path, older)
        path, content = older, load(older)
    overrides = [o for o in HydraConfig.get().overrides.task if not o.startswith("resume=")]
    config = changed(content["config"], overrides)
    updates = content["progress"]["update"]
    folder = RunFolder.of_checkpoint(path)
    if overrides and last_update(folder.metrics) > updates:
        raise UsageError(
            f"resume={where}: updates after {updates} are logged already, so {overrides[0]} would make "
            "their points false; resume without changes first"
        )
    summary = folder.summary()
    if not overrides and summary and summary.finished:
        raise UsageError(f"resume={where}: the run is finished; more of it with trainer.epochs=<more>")
    return Resumed(config, content, path, overrides)


def changed(plain: dict[str, Any], overrides: Sequence[str]) -> Config:
    """A checkpoint's configuration with `key=value` overrides; groups cannot be exchanged in it.

    Raises:
        UsageError: for an unknown key, a wrong value, or an override that is not a plain value.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    cfg = OmegaConf.create(plain)
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UsageError(" ".join(str(error).split())) from error
    for override in parsed:
        key = override.key_or_group
        exists = OmegaConf.select(cfg, key, default=_NOTHING) is not _NOTHING
        whole = isinstance(plain.get(key), dict)
        if override.type is None or whole or not (exists or override.is_add()):
            raise UsageError(
                f"{override.input_line}: only values of the run's own configuration can be changed, "
                "such as trainer.epochs=40"
            )
        if override.is_delete() or override.is_sweep_override():
            raise UsageError(f"{override.input_line}: a single value is needed")
        OmegaConf.update(cfg, key, override.value(), force_add=True)
    _forget_third(cfg, {override.key_or_group for override in parsed})
    return from_hydra(cfg)


_NOTHING = object()
REDUCE = "reduce_every_micro_batch"


def _forget_third(cfg: DictConfig, given: set[str]) -> None:
    """Lets what was not given follow from the rest: a checkpoint holds ranks and all sizes filled in."""
    steps, micro, ranks, strategy = (
        f"accum.{k}" for k in ("steps", "micro_batch_size", "processes", "strategy")
    )
    if ranks not in given and (strategy in given or launched_rank() is not None):
        OmegaConf.update(cfg, ranks, None)
        given = given | {ranks}
    if strategy in given and f"accum.{REDUCE}" not in given:
        OmegaConf.update(cfg, f"accum.{REDUCE}", False)  # which other strategies do not have
    if micro in given and steps not in given:
        OmegaConf.update(cfg, steps, None)
    elif micro not in given and given & {steps, ranks, "data.batch_size"}:
        OmegaConf.update(cfg, micro, None)


def _older(path: Path) -> Path | None:
    from ..training.checkpoint import load, saved_updates

    for candidate in reversed([other for other in saved_updates(path.parent) if other < path]):
        try:
            load(candidate)
        except UsageError:
            continue
        return candidate
    return None
