"""`resume=`: the run whose checkpoint is resumed, with its own configuration and the command's overrides."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..config.overrides import changed, keys_of
from ..config.schema import Config
from ..errors import UsageError
from ..tracking.folder import RunFolder
from .resume_changes import changes, check_changes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """A run to resume: its configuration, and the content of its checkpoint.

    Attributes:
        config: that of the checkpoint with the overrides.
        overrides: those of the command that resumes it.
    """

    config: Config
    content: dict[str, Any]
    path: Path
    overrides: list[str]

    @property
    def changes(self) -> dict[str, Any]:
        """The settings that differ from the checkpoint's, by dotted key."""
        return changes(changed(self.content["config"], []), self.config) if self.overrides else {}

    @property
    def interpolations(self) -> dict[str, str]:
        """The expressions of the configuration's values that are derived from others."""
        derived = self.content.get("interpolations", {})
        return {key: value for key, value in derived.items() if key not in keys_of(self.overrides)}

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


def resumed(cfg: DictConfig, overrides: Sequence[str]) -> Resumed | None:
    """What `cfg.resume` names, with the `overrides` on top; None if it names nothing.

    A run whose newest checkpoint is damaged goes on from the one before, and says so.

    Raises:
        UsageError: if there is no readable checkpoint, the run is finished, or an override changes what
            updates already logged would have been.
    """
    if not cfg.resume:
        return None
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
    overrides = list(overrides)
    config = changed(content["config"], overrides, content.get("interpolations"))
    updates = content["progress"]["update"]
    folder = RunFolder.of_checkpoint(path)
    if overrides and last_update(folder.metrics) > updates:
        raise UsageError(
            f"resume={where}: updates after {updates} are logged already, so {overrides[0]} would make "
            "their points false; resume without changes first"
        )
    if overrides:
        before = changed(content["config"], [])
        check_changes(before, config, content["progress"], recorded=bool(content.get("run")))
    summary = folder.summary()
    if not overrides and summary and summary.finished:
        raise UsageError(f"resume={where}: the run is finished; more of it with trainer.epochs=<more>")
    return Resumed(config, content, path, overrides)


def _older(path: Path) -> Path | None:
    from ..training.checkpoint import load, saved_updates

    for candidate in reversed([other for other in saved_updates(path.parent) if other < path]):
        try:
            load(candidate)
        except UsageError:
            continue
        return candidate
    return None
