"""`resume=`: the checkpoint of a run, with the run's own configuration and the command's overrides."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..config.overrides import changed
from ..config.schema import Config
from ..errors import UsageError
from ..tracking.folder import RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """A run to resume: its configuration and checkpoint, and the overrides of the resuming command."""

    config: Config
    content: dict[str, Any]
    path: Path
    overrides: list[str]

    @property
    def update(self) -> int:
        return self.content["progress"]["update"]

    @property
    def ended_by(self) -> str | None:
        """Why a callback ended the run early; None with overrides, which may ask for more updates."""
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
    """The job of a sweep that wrote the checkpoint `path`, with its unchanged configuration."""
    from ..training.checkpoint import load

    content = load(path)
    return Resumed(changed(content["config"], []), content, path, [])


def resumed(cfg: DictConfig) -> Resumed | None:
    """The run that `cfg.resume` names, with this command's other overrides; None if it names nothing.

    If the newest checkpoint is damaged, the run is resumed from the one before, with a warning.

    Raises:
        UsageError: if there is no readable checkpoint, the run is finished, or an override would change
            updates that are already logged.
    """
    if not cfg.resume:
        return None
    from hydra.core.hydra_config import HydraConfig

    from ..tracking.journal import last_update
    from ..training.checkpoint import find, load, saved_updates

    where = Path(str(cfg.resume))
    path = newest = find(where)
    older = [other for other in saved_updates(path.parent) if other < path] if where.is_dir() else []
    while True:
        try:
            content = load(path)
            break
        except UsageError:
            if not older:
                load(newest)  # raises its own error
            path = older.pop()
    if path != newest:
        log.warning("checkpoint %s is damaged, going on from %s", newest, path)
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
