"""`resume=`: a run goes on with its own configuration, in its own folder; `sweep.resume=`: a sweep does."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..config.overrides import changed
from ..config.report import report_from
from ..config.schema import Config
from ..errors import UsageError
from ..sweeps.job_folders import ADDED, MULTIRUN, REPORT, Launch, asked_for

log = logging.getLogger(__name__)

SWEEP = "sweep.resume="


@dataclass(frozen=True)
class Resumed:
    """A run to go on with: its configuration, and what its checkpoint holds."""

    config: Config
    content: dict[str, Any]
    path: Path
    overrides: list[str]

    @property
    def update(self) -> int:
        return self.content["progress"]["update"]

    @property
    def ended_by(self) -> str | None:
        """Why it had ended before its last update, of its own will; None if overrides may ask for more."""
        return None if self.overrides else self.content.get("ended_by")

    def tags(self) -> dict[str, str]:
        said = " ".join(self.overrides) or "unchanged"
        return {f"accumexp.resumed.{self.update}": said}


def command_lines(arguments: Sequence[str]) -> tuple[list[list[str]], dict[str, str]]:
    """(What Hydra is to run, one after the other; the settings of a resumed sweep's report) for a command.

    Raises:
        UsageError: if there is nothing to resume where the command says so.
    """
    if any(a.startswith(SWEEP) for a in arguments):
        return sweep_arguments(arguments)
    return [resume_arguments(replicas_arguments(arguments))], {}


def replicas_arguments(arguments: Sequence[str]) -> list[str]:
    """The command's arguments, as those of a sweep of one job where they ask for replicas."""
    asked = [a.partition("=")[2] for a in arguments if a.startswith("replicas=")]
    plain = any(a.startswith(("resume=", "--")) for a in arguments) or MULTIRUN & set(arguments)
    several = bool(asked) and asked[-1].isdigit() and int(asked[-1]) > 1
    return ["-m", "hydra/hydra_logging=none", *arguments] if several and not plain else list(arguments)


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """The command's arguments, with Hydra told to work in the resumed run's folder.

    Raises:
        UsageError: if there is nothing to resume there, or a sweep is asked for too.
    """
    arguments = list(arguments)
    where = next((a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("resume=")), None)
    if where in (None, "", "null"):
        return arguments
    if MULTIRUN & set(arguments):
        raise UsageError("resume: goes on with one run, leave out -m")
    folder = Path(where)
    if not folder.exists():
        raise UsageError(f"resume={where}: no such file or folder, give a run's folder or a checkpoint")
    if folder.is_file():
        folder = folder.parent.parent
    elif folder.name == "checkpoints":
        folder = folder.parent
    if set("=,") & set(where):  # as the name of a job's folder has, and no override may without quotes
        arguments = [f"resume='{where}'" if a.startswith("resume=") else a for a in arguments]
    return [*arguments, f"hydra.run.dir='{folder.resolve()}'", "hydra.output_subdir=null"]


def sweep_arguments(arguments: Sequence[str]) -> tuple[list[list[str]], dict[str, str]]:
    """`arguments` with `sweep.resume=<folder>`, as Hydra launches that sweep once more in its folder.

    Without overrides of the task, those of all its launches are taken, a line for each set of jobs, and
    what they told Hydra unless given anew. `report.*` settings make no other jobs: they are told apart.

    Raises:
        UsageError: if there is no sweep in the folder, or no sweep is asked for, or a setting is wrong.
    """
    (where, *more) = [a.removeprefix(SWEEP) for a in arguments if a.startswith(SWEEP)]
    rest = [a for a in arguments if a and not a.startswith(SWEEP)]
    if more:
        raise UsageError("sweep.resume: goes on with one sweep, give one folder")
    if any(a.startswith("resume=") for a in rest):
        raise UsageError("sweep.resume: goes on with all runs of a sweep, leave out resume=")
    if not MULTIRUN & set(rest):
        raise UsageError(f"{SWEEP}{where}: goes on with a sweep, add -m")
    folder = Path(where.strip("'\""))
    if not where or not (folder / "multirun.yaml").is_file():
        raise UsageError(f"{SWEEP}{where}: no sweep there, give the folder of one, which holds multirun.yaml")
    reported = [a for a in rest if _key(a).startswith(REPORT)]
    changes = {_key(a): a.partition("=")[2] for a in reported}
    report_from({}, changes)
    rest = [a for a in rest if a not in reported]
    given = {_key(a) for a in rest if a[0] != "-" and ("=" in a or a[0] == "~")}
    if "report" in given:
        raise UsageError(f"{SWEEP}{where}: give a report's settings one by one, such as report.margin=2")
    lines = [rest]
    if all(key.startswith("hydra") for key in given):
        lines = [
            [*rest, *own.task, *(a for a in own.hydra if not _replaced(_key(a), given))]
            for own in asked_for(folder) or [_last_asked(folder)]
        ]
    return [[*line, f"hydra.sweep.dir='{folder.resolve()}'"] for line in lines], changes


def _last_asked(sweep: Path) -> Launch:
    """What Hydra has kept of a sweep's newest launch."""
    node = OmegaConf.load(sweep / "multirun.yaml")
    assert isinstance(node, DictConfig)
    own = OmegaConf.to_container(node.hydra.overrides, resolve=False)
    assert isinstance(own, dict)
    return Launch("", own["task"], own["hydra"])


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def _replaced(key: str, given: set[str]) -> bool:
    """Whether a sweep's override of Hydra is left out: it is given anew, or goes with a group that is."""
    groups = {other.replace("/", ".") for other in given if "/" in other}
    return key in ADDED | given or any(key.startswith(f"{group}.") for group in groups)


def going_on(path: Path) -> Resumed:
    """A job of a sweep, unchanged from its checkpoint `path`."""
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
    journal = path.parent.parent / "metrics.jsonl"
    if overrides and last_update(journal) > updates:
        raise UsageError(
            f"resume={where}: updates after {updates} are logged already, so {overrides[0]} would make "
            "their points false; resume without changes first"
        )
    if not overrides and _finished(path):
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


def _finished(path: Path) -> bool:
    import json

    summary = path.parent.parent / "summary.json"
    return summary.is_file() and json.loads(summary.read_text()).get("status") == "FINISHED"
