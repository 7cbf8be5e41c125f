"""A sweep's folder: the launches that write to it, and the summaries of its runs."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from ..errors import UsageError, print_error
from ..tracking.addresses import check_credentials
from ..tracking.json_file import read_json
from ..tracking.run_folder import RunFolder, Summary
from .hydra_sweep import LAUNCH, command_line, count_jobs, file_flags, runs_in_parallel
from .job_folders import Launch, begin_launch, job_folders, number_of
from .live_view import LiveView

# The parent run's id, experiment and store, in the sweep's folder.
PARENT = "sweep.json"


def parent_of(sweep: Path) -> dict[str, Any]:
    """The entries of the sweep's parent run: `run_id`, `experiment_id`, `uri` and `launch`.

    Raises:
        UsageError: if they are damaged, or name a server that credentials may not be sent to unasked.
    """
    path = sweep / PARENT
    entries = read_json(path)
    if not all(isinstance(entries.get(name), str) for name in ("run_id", "experiment_id", "uri")):
        raise UsageError(f"{path}: is damaged: it names no run and store")
    check_credentials(entries["uri"], str(path))
    return entries


@dataclass
class LaunchedSweep:
    """The sweep that this process launches. Its methods alone set the fields.

    Attributes:
        arguments: the command's arguments, as typed.
        folder: the sweep's folder, None before a launch has begun.
        launches: the numbers of the launches that this process has begun.
        jobs: the number of jobs of the newest launch, None if the sweeper is not Hydra's own.
    """

    arguments: Sequence[str] = ()
    folder: Path | None = None
    launches: tuple[int, ...] = ()
    jobs: int | None = None
    _view: LiveView | None = None
    _locks: list[FileLock] = field(default_factory=list)

    def reset(self, arguments: Sequence[str] = ()) -> None:
        """Prepares for a new command with these arguments."""
        self.stop_view()
        self.release()
        self.arguments, self.folder, self.launches, self.jobs = arguments, None, (), None

    def begin(self, config: DictConfig) -> int:
        """Records a launch of the sweep that `config` describes, shows its view, and returns its number.

        Raises:
            UsageError: if the sweep's list of launches is damaged.
        """
        folder = Path(config.hydra.sweep.dir).absolute()
        overrides: Any = OmegaConf.to_container(config.hydra.overrides, resolve=False)
        command = command_line(self.arguments)
        files = file_flags(sys.argv[1:])
        number = begin_launch(folder, Launch(command, overrides["task"], overrides["hydra"], files))
        lock = RunFolder(folder).launch_lock(number)
        lock.acquire()
        self._locks.append(lock)
        self.folder, self.launches = folder, (*self.launches, number)
        self.jobs, varied = count_jobs(config.hydra.sweeper, overrides["task"])
        self.stop_view()  # of the launch before
        if runs_in_parallel(config.hydra.launcher) and config.trainer.progress is not False:
            self._view = LiveView.on_terminal(folder, number, self.jobs, varied, config.monitor, config.mode)
        return number

    def release(self) -> None:
        """Ends the launches of this process, whose locks the system releases if it is killed."""
        while self._locks:
            lock = self._locks.pop()
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def stop_view(self) -> None:
        if self._view is not None:
            self._view.stop()
            self._view = None


launched_sweep = LaunchedSweep()


class SweepFolder(Callback):
    """Hydra's callback of a run and of a sweep.

    Args:
        launch: 0 for the sweep's first launch; set to the launch's number when it begins.
    """

    def __init__(self, launch: int = 0) -> None:
        self.launch = launch

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuses a folder that holds a run before Hydra writes into it."""
        try:
            if not config.resume:
                RunFolder(Path(config.hydra.run.dir).absolute()).check_unused("hydra.run.dir")
            _make(Path(config.hydra.run.dir), "hydra.run.dir")
        except UsageError as error:  # Hydra would turn it into a warning
            raise SystemExit(print_error(error)) from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            _make(Path(config.hydra.sweep.dir), "hydra.sweep.dir")
            self.launch = launched_sweep.begin(config)
        except UsageError as error:  # Hydra would turn it into a warning
            raise SystemExit(print_error(error)) from error
        if self.launch:
            with read_write(config):  # the launcher composes its jobs' configuration from these
                config.hydra.callbacks.sweep.launch = self.launch
                config.hydra.overrides.hydra.append(f"{LAUNCH}={self.launch}")


def _make(folder: Path, key: str) -> None:
    """
    Raises:
        UsageError: naming `key`, if the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "no right to write")
    except OSError as error:
        raise UsageError(f"{key}={folder}: cannot be used: {error.strerror}; give another folder") from error


@dataclass
class SweepRun(Summary):
    """The summary of a run in a sweep.

    Attributes:
        folder: the run's folder.
        job_folder: the name of its job's folder in the sweep's.
    """

    folder: Path = field(default_factory=Path)
    job_folder: str = ""


def sweep_runs(sweep: Path) -> list[SweepRun]:
    """The runs of a sweep in the order of its jobs; each replica of a job is a run."""
    runs = []
    named = [sweep / name for name in dict.fromkeys(one.folder for one in job_folders(sweep))]
    numbered = [path for path in sweep.glob("[0-9]*_*") if path.is_dir() and path not in named]
    for job in sorted([*named, *numbered], key=number_of):
        summary, name = RunFolder(job).summary(), str(job.relative_to(sweep))
        if summary is None:
            continue
        replicas = [(job / one, RunFolder(job / one).summary()) for one in summary.replicas]
        written = [(folder, one) for folder, one in replicas if one is not None]
        for folder, one in written or [(job, summary)]:
            runs.append(SweepRun(**{**asdict(one), "status": one.status}, folder=folder, job_folder=name))
    return runs
