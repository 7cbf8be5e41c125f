"""A sweep: one parent run, a child run for each job, each job in its place."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from ..errors import UsageError, print_error
from ..tracking.journal import SUMMARY, write_whole
from .job_folders import (
    ADDED,
    LAUNCH,
    MULTIRUN,
    Launch,
    begin_launch,
    command_line,
    counted,
    launches,
    parallel,
    slug,
)
from .live_view import View

if TYPE_CHECKING:
    from ..config.schema import TrackingConfig
    from ..tracking import Store

PARENT = "sweep.json"


class SweepFolder(Callback):
    """Tells where Hydra puts the sweep that this process launches.

    Args:
        launch: 0 for the sweep's first launch; the number of another is known, and told, when it begins.
    """

    current: Path | None = None
    own_launches: tuple[int, ...] = ()  # the launches that this process has begun
    asked: Sequence[str] = ()  # its command line, as typed
    jobs: int | None = None  # how many it has, where Hydra's own sweeper counts them
    view: View | None = None

    def __init__(self, launch: int = 0) -> None:
        self.launch = launch

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir).absolute()
        asked: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)
        said = command_line(SweepFolder.asked)
        try:
            self.launch = begin_launch(folder, Launch(said, asked["task"], asked["hydra"]))
        except UsageError as error:  # of which Hydra would make a warning
            raise SystemExit(print_error(error)) from error
        if self.launch:
            with read_write(config):  # the launcher composes its jobs' configuration from these
                config.hydra.callbacks.sweep.launch = self.launch
                config.hydra.overrides.hydra.append(f"{LAUNCH}={self.launch}")
        SweepFolder.current, SweepFolder.own_launches = folder, (*SweepFolder.own_launches, self.launch)
        SweepFolder.jobs, varied = counted(config.hydra.sweeper, config.hydra.overrides.task)
        SweepFolder.stop_view()  # of the launch before
        if parallel(config.hydra.launcher) and config.trainer.progress is not False:
            told = (SweepFolder.jobs, varied, config.monitor, config.mode)
            SweepFolder.view = View.on_terminal(folder, self.launch, *told)

    @classmethod
    def stop_view(cls) -> None:
        if cls.view is not None:
            cls.view.stop()
            cls.view = None


@dataclass(frozen=True)
class SweepJob:
    """One job's place in its sweep.

    Attributes:
        number, name: of its folder.
        folder: the sweep's.
        command: the command line that asked for the sweep; a launcher's worker has one of its own.
        batch: the jobs that are handed to the launcher together, None if the sweeper is not Hydra's own.
        parallel: whether others may run at the same time, here or elsewhere.
        launch: of the sweep, 0 for the first.
        turn, jobs: the launch's job `turn` of `jobs`, as far as this process knows.
        alone: whether the command asked for no sweep, but for replicas.
    """

    number: int
    name: str
    folder: Path
    overrides: list[str]
    command: str
    batch: int | None
    parallel: bool = False
    launch: int = 0
    turn: int = 1
    jobs: int | None = None
    alone: bool = False

    @classmethod
    def of(cls, hydra: Any) -> SweepJob | None:
        """The job that Hydra's configuration describes, None outside a sweep."""
        from hydra.types import RunMode

        if hydra.mode != RunMode.MULTIRUN:
            return None
        number, _, name = Path(hydra.runtime.output_dir).name.partition("_")
        folder = Path(hydra.sweep.dir).absolute()
        written = folder / "multirun.yaml"  # by Hydra's sweeper, before the first job
        asked = OmegaConf.load(written).hydra.overrides if written.exists() else hydra.overrides
        arguments = list(SweepFolder.asked or sys.argv[1:])
        if SweepFolder.current is None:
            own = [override for override in asked.hydra if override.partition("=")[0] not in ADDED]
            arguments = ["-m", *asked.task, *own]
        batch, _ = counted(hydra.sweeper, asked.task)
        if batch is not None:
            batch = min(batch, hydra.sweeper.get("max_batch_size") or batch)
        return cls(
            *(int(number), name, folder, list(hydra.overrides.task), command_line(arguments), batch),
            parallel=parallel(hydra.launcher),
            launch=int(hydra.callbacks.sweep.launch),
            turn=int(hydra.job.num) + 1,
            jobs=SweepFolder.jobs if SweepFolder.current == folder else None,
            alone=SweepFolder.current == folder and not MULTIRUN & set(SweepFolder.asked),
        )

    def replica(self, seed: int) -> SweepJob:
        """The job that the run of `seed` would be, had it been asked for alone."""
        others = [
            one for one in self.overrides if one.partition("=")[0].lstrip("+") not in ("replicas", "seed")
        ]
        overrides = [*others, f"seed={seed}"]
        return replace(self, name=slug(",".join(sorted(overrides))), overrides=overrides)

    @property
    def title(self) -> str:
        return f"job {self.number} {self.name}"

    def parent(self, store: Store | None) -> str | None:
        """The parent run's id; the first job that gets so far makes it, so a bad command line makes none."""
        if store is None:
            return None
        known = self.folder / PARENT
        with FileLock(self.folder / ".sweep.lock", timeout=120):
            if not known.exists():
                tags = {
                    "accumexp.command": self.command,
                    "accumexp.folder": str(self.folder),
                    "accumexp.sweep": "true",
                }
                run_id = store.create_run(f"sweep {self.folder.name}", tags)
                store.arrange_sweep(run_id)
                written = {"run_id": run_id, "experiment_id": store.experiment_id, "uri": store.uri}
                write_whole(known, {**written, "launch": self.launch})
            written = json.loads(known.read_text())
            if written.get("launch", 0) < self.launch:
                store.open_again(written["run_id"], launches(self.folder)[self.launch].command)
                write_whole(known, {**written, "launch": self.launch})
            return written["run_id"]

    def same_store(self, tracking: TrackingConfig) -> None:
        """Keeps a sweep in the store it began in, whatever folder it goes on from."""
        known = self.folder / PARENT
        if tracking.uri is None and known.exists():
            tracking.uri = json.loads(known.read_text())["uri"]

    def failed(self, folder: Path, error: Exception) -> None:
        """Notes the job's failure where the sweep's end will find it."""
        summary = folder / SUMMARY
        known: dict[str, Any] = {"overrides": self.overrides}
        if summary.exists():
            known = json.loads(summary.read_text())
        known.update(status="FAILED", error=str(error) or type(error).__name__, launch=self.launch)
        write_whole(summary, known)


def summaries(folder: Path) -> list[dict[str, Any]]:
    """What every run of a sweep wrote of itself, in the order of the jobs; replicas are a run each.

    With where: `folder` is the run's, `place` the name of its job's in the sweep's.
    """
    paths = sorted(folder.glob(f"*_*/{SUMMARY}"), key=lambda path: int(path.parent.name.partition("_")[0]))
    found = []
    for path in paths:
        place, written = path.parent, json.loads(path.read_text())
        runs = [place / name for name in written.get("replicas", ()) if (place / name / SUMMARY).exists()]
        for run in runs or [place]:
            own = json.loads((run / SUMMARY).read_text())
            found.append({**own, "folder": str(run), "place": place.name})
    return found
