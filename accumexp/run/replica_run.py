"""A sweep's job of many seeds: runs that are trained together, each with its own folder and record."""

from __future__ import annotations

import math
import signal
import statistics
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ..data import ResidentBatches
from ..data.replica_batches import PlannedBatches
from ..environment.console import console, duration
from ..environment.memory import reset_peak_memory
from ..environment.random_state import random_state
from ..environment.ranks import RankInfo
from ..environment.signals import StopSignals, exit_code_of
from ..errors import TrainingError
from ..sweeps.job_status import job_status
from ..tracking.metrics_file import ProgressFile
from ..tracking.run_folder import RunFolder, RunStatus, Summary
from ..training.callbacks import Callback
from ..training.components import placement
from ..training.replica_check import check_replicable, shared_splits
from ..training.replica_trainer import ReplicaTrainer, mean
from ..training.trainer import Trainer
from .messages import announce
from .session import Run
from .spec import Resumed, RunSpec

REPLICAS_TAG = "accumexp.replicas"


class ReplicaRun:
    """The job of a sweep that trains the replicas of `spec` together.

    Finished replicas are skipped; the others are resumed from their checkpoints, those at the same update
    together.
    """

    def __init__(self, spec: RunSpec) -> None:
        assert spec.job is not None
        self.spec = spec
        self.job = spec.job
        self.key = f"replicas={len(spec.replicas)}"
        self.folders = [RunFolder(spec.folder.path / f"seed={config.seed}") for config in spec.replicas]
        self.stop_code = 0
        self.updates = 0

    def execute(self) -> float | None:
        """Trains all replicas and returns their mean monitored value; None if one failed.

        Raises a `UsageError` before anything is opened if they cannot be trained together.
        """
        with StopSignals() as signals:
            for runs in self._runs_by_update():
                self._train(runs, signals)
                if self.stop_code:
                    break
        if self.stop_code:
            self._summarise(RunStatus.KILLED)
            name = signal.Signals(self.stop_code).name
            console.print(f"stopped by {name} after update {self.updates}", highlight=False)
            sys.exit(exit_code_of(self.stop_code))
        summaries = [folder.summary() for folder in self.folders]
        finished = [summary for summary in summaries if summary and summary.finished]
        values = [summary.monitored for summary in finished if summary.monitored is not None]
        failed = len(summaries) - len(finished)
        monitored = statistics.fmean(values) if values and not failed else None
        error = f"{failed} of {len(summaries)} replicas failed" if failed else None
        status = RunStatus.FAILED if failed else RunStatus.FINISHED
        final = mean([summary.final for summary in finished])
        self._summarise(status, final=final, monitored=monitored, error=error)
        parts = [_mean_and_deviation(finished, self.spec.config.monitor), *([error] if error else [])]
        console.print(f"{self.job.title}: {', '.join(parts)}", highlight=False, soft_wrap=True, markup=False)
        return monitored

    def _runs_by_update(self) -> list[list[Run]]:
        """The replicas that have not finished, in groups that start at the same update."""
        groups: dict[int, list[Run]] = {}
        for config, folder in zip(self.spec.replicas, self.folders, strict=True):
            status, job = job_status(folder), self.job.replica(config.seed)
            if status.finished:
                print(f"{job.title}: finished before", flush=True)
                continue
            resume_from = None
            if status.checkpoint:
                resume_from = Resumed.read(status.checkpoint, trust=self.spec.own_trust)
            spec = replace(
                self.spec,
                config=resume_from.config if resume_from else config,
                folder=folder,
                job=job,
                resume_from=resume_from,
                from_environment=(resume_from or self.spec).from_environment,
                replicas=[],
            )
            update = resume_from.update if resume_from else 0
            groups.setdefault(update, []).append(Run(spec, RankInfo()))
        return [groups[update] for update in sorted(groups)]

    def _train(self, runs: Sequence[Run], signals: StopSignals) -> None:
        config = runs[0].spec.config
        splits = shared_splits(config, placement(config, RankInfo()), self.key)
        assert isinstance(splits.train, ResidentBatches)
        for run in runs:
            run.build(replace(splits, train=PlannedBatches(splits.train, run.spec.config.seed)))
            # Training draws nothing, so this is the random state of the run alone.
            state = random_state()
            run.trainer.random_state = lambda state=state: state
        trainers = [run.trainer for run in runs]
        together = ReplicaTrainer(trainers, self._displays(trainers))
        if self.job.jobs and self.job.jobs > 1:
            together.title = f"job {self.job.turn} of {self.job.jobs}, "
        check_replicable(together, self.key)
        running = {run.trainer: run for run in runs}

        def ended(trainer: Trainer, error: TrainingError | None) -> None:
            run = running.pop(trainer)
            if error is not None:
                run.fail(error)
                return
            with run.closed_on_error():
                run.finish()
            self.stop_code = max(self.stop_code, trainer.stop_code if run.interrupted else 0)

        try:
            for run in runs:
                self._open(run, len(runs))
            self._summarise(RunStatus.RUNNING)
            seeds = ", ".join(str(run.spec.config.seed) for run in runs)
            console.print(f"{len(runs)} runs together, of seeds {seeds}; each:", highlight=False)
            announce(runs[0].experiment, trainers[0], runs[0].unequal)
            reset_peak_memory(runs[0].experiment.device)
            signals.trainer = together
            together.fit(ended)
        except BaseException as error:
            with ExitStack() as stack:
                for run in running.values():
                    stack.callback(run.fail, error)
            self._summarise(RunStatus.FAILED if isinstance(error, Exception) else RunStatus.KILLED)
            raise
        finally:
            self.updates = together.progress.update
            signals.trainer = None
            splits.close()

    def _open(self, run: Run, together: int) -> None:
        tags = {REPLICAS_TAG: str(together)}
        run.folder.path.mkdir(parents=True, exist_ok=True)
        if not run.spec.resume_from:
            run.folder.clear()
        run.open(tags)
        if run.spec.resume_from:
            run.record.tag(tags)
        run.attach()

    def _displays(self, trainers: Sequence[Trainer]) -> list[Callback]:
        """Removes the progress callbacks from every trainer; those of the first show all replicas."""
        displays = [callback for callback in trainers[0].callbacks.values() if callback.shows]
        for trainer in trainers:
            for name in [name for name, callback in trainer.callbacks.items() if callback.shows]:
                del trainer.callbacks[name]
        if self.job.parallel:
            file = ProgressFile(self.spec.folder.progress, trainers[0].total_updates)
            displays.append(_WriteProgress(file))
        return displays

    def _summarise(self, status: RunStatus, **values: Any) -> None:
        names = [folder.path.name for folder in self.folders]
        job: dict[str, Any] = {"overrides": self.job.overrides, "launch": self.job.launch, "replicas": names}
        self.spec.folder.write_summary(Summary(status, **job, **values))


class _WriteProgress(Callback):
    """Writes the job's `progress.json`."""

    def __init__(self, file: ProgressFile) -> None:
        self.file = file

    def logged(self, trainer: Trainer, values: dict[str, float]) -> None:
        self.file.write(trainer.progress.update, values)


def _mean_and_deviation(summaries: Iterable[Summary], monitor: str) -> str:
    """One line with mean and standard deviation over the finished replicas."""
    finals = [summary.final for summary in summaries]
    if not finals:
        return "no replica finished"
    parts = []
    for key in dict.fromkeys(("accuracy", monitor.partition("/")[2], "loss")):
        values = [final[key] for final in finals if key in final]
        if values:
            has_deviation = len(values) > 1 and all(map(math.isfinite, values))
            deviation = f" ± {statistics.stdev(values):.4f}" if has_deviation else ""
            parts.append(f"test {key} {statistics.fmean(values):.4f}{deviation}")
    updates, seconds = (max(final[key] for final in finals) for key in ("updates", "seconds"))
    return f"{', '.join(parts)} over {len(finals)} seeds, {updates:.0f} updates in {duration(seconds)}"
