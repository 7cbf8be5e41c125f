"""A job of a sweep: its place in the sweep, its parent run, and how its failure is recorded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ..errors import UsageError, masked
from ..tracking.json_file import write_json
from ..tracking.run_folder import RunFolder, RunStatus, Summary
from ..tracking.yaml_file import read_yaml
from .hydra_sweep import ADDED, MULTIRUN, command_line, count_jobs, runs_in_parallel, typed_overrides
from .job_folders import launches, number_of, record_folder, slug
from .sweep import PARENT, launched_sweep, parent_of

if TYPE_CHECKING:
    from ..config.schema import TrackingConfig
    from ..tracking import Store


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep.

    Attributes:
        number, name: of its folder.
        folder: the sweep's folder.
        command: the command line of the sweep; a launcher's worker has another one.
        batch: the jobs that are handed to the launcher together, None if the sweeper is not Hydra's own.
        parallel: whether other jobs may run at the same time, on this machine or another.
        launch: the launch of the sweep, 0 for the first.
        turn, jobs: the job is number `turn` (from 1) of the `jobs` of its launch; `jobs` is None if unknown.
        alone: the command is no sweep, but has `replicas=`.
        varied: the keys in which the jobs of the sweep differ; empty if the sweeper is not Hydra's own.
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
    varied: Sequence[str] = ()

    @classmethod
    def of(cls, hydra: Any) -> SweepJob | None:
        """The job that Hydra's configuration describes, None outside a sweep."""
        from hydra.types import RunMode

        if hydra.mode != RunMode.MULTIRUN:
            return None
        task, _ = typed_overrides(hydra)
        folder = (Path(hydra.runtime.cwd) / hydra.sweep.dir).absolute()
        output, launch = Path(hydra.runtime.output_dir), int(hydra.callbacks.sweep.launch)
        if not output.is_relative_to(folder) or output == folder:
            raise UsageError(f"hydra.sweep.subdir: {output} is no folder inside hydra.sweep.dir={folder}")
        job_folder = str(output.relative_to(folder))
        record_folder(folder, launch, int(hydra.job.num), job_folder, task)
        number, name = number_of(job_folder), output.name.partition("_")[2]
        if number < 0:
            number, name = int(hydra.job.num), slug(",".join(task))
        multirun = folder / "multirun.yaml"  # written by Hydra's sweeper before the first job
        written: Any = read_yaml(multirun) if multirun.exists() else None
        task_lines, hydra_lines = typed_overrides(written.hydra if written else hydra)
        arguments = list(launched_sweep.arguments or sys.argv[1:])
        if launched_sweep.folder is None:
            typed = [override for override in hydra_lines if override.partition("=")[0] not in ADDED]
            arguments = ["-m", *task_lines, *typed]
        batch, varied = count_jobs(hydra.sweeper, task_lines)
        if batch is not None:
            batch = min(batch, hydra.sweeper.get("max_batch_size") or batch)
        launched_here = launched_sweep.folder == folder
        return cls(
            *(number, name, folder, task, command_line(arguments), batch),
            parallel=runs_in_parallel(hydra.launcher),
            launch=launch,
            turn=int(hydra.job.num) + 1,
            jobs=launched_sweep.jobs if launched_here else None,
            alone=launched_here and not MULTIRUN & set(launched_sweep.arguments),
            varied=varied,
        )

    def replica(self, seed: int) -> SweepJob:
        """The job of the run of `seed`, as it would be in a sweep over seeds."""
        others = [
            one for one in self.overrides if one.partition("=")[0].lstrip("+") not in ("replicas", "seed")
        ]
        overrides = [*others, f"seed={seed}"]
        name = slug(",".join(sorted(overrides)))
        return replace(self, name=name, overrides=overrides, varied=[*self.varied, "seed"])

    @property
    def run_name(self) -> str:
        """The name of its run in MLflow: the overrides in which the sweep's jobs differ."""
        varied = [one for one in self.overrides if one.partition("=")[0].lstrip("+") in self.varied]
        return slug(",".join(varied)) if varied else self.name

    @property
    def title(self) -> str:
        return f"job {self.number} {self.name}"

    def parent(self, store: Store | None) -> str | None:
        """The id of the parent run, created by the first job that asks for it; None without a store."""
        if store is None:
            return None
        path = self.folder / PARENT
        with FileLock(self.folder / ".sweep.lock", timeout=120):
            if not path.exists():
                tags = {
                    "accumexp.command": self.command,
                    "accumexp.folder": str(self.folder),
                    "accumexp.sweep": "true",
                }
                run_id = store.create_run(f"sweep {self.folder.name}", tags)
                store.arrange_sweep(run_id)
                entries = {"run_id": run_id, "experiment_id": store.experiment_id, "uri": store.uri}
                write_json(path, {**entries, "launch": self.launch})
            entries = parent_of(self.folder)
            if entries.get("launch", 0) < self.launch:
                store.open_again(entries["run_id"], launches(self.folder)[self.launch].command)
                write_json(path, {**entries, "launch": self.launch})
            return entries["run_id"]

    def same_store(self, tracking: TrackingConfig) -> None:
        """Keeps a sweep in the store it began in, whatever folder it is resumed from."""
        path = self.folder / PARENT
        if tracking.uri is None and path.exists():
            tracking.uri = parent_of(self.folder)["uri"]

    def record_failure(self, folder: RunFolder, error: Exception) -> None:
        """Writes the job's failure into its summary, where the sweep's end reads it."""
        summary = folder.summary() or Summary(RunStatus.FAILED, overrides=self.overrides)
        summary.status, summary.launch = RunStatus.FAILED, self.launch
        summary.error = masked(str(error)) or type(error).__name__
        folder.write_summary(summary)
