"""A job of many seeds: runs that are trained together, each with a folder and a record of its own."""

from __future__ import annotations

import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..accum import inequalities
from ..data import ResidentBatches, Splits
from ..data.replica_batches import PlannedBatches
from ..environment.console import console, duration
from ..environment.memory import reset_peak_memory
from ..environment.random_state import random_state
from ..environment.ranks import RankInfo
from ..environment.signals import StopSignals
from ..errors import TrainingError
from ..sweeps.job_status import clear, job_status
from ..tracking.journal import SUMMARY, ProgressFile, read_whole, write_whole
from ..training.callbacks import Callback, LossMonitor
from ..training.checkpoint import Checkpoints, restore
from ..training.components import placement
from ..training.experiment import Experiment
from ..training.progress_display import Progress
from ..training.replica_check import check_replicable, shared_splits
from ..training.replica_trainer import ReplicaTrainer, mean
from ..training.trainer import Trainer
from .record import RunRecord, SilentRecord
from .resume import going_on
from .session import Run, announce, finals
from .spec import RunSpec

REPLICAS = "accumexp.replicas"
FINISHED = "FINISHED"


class Replica(Run):
    """One seed's run among those that are trained together."""

    def build(self, splits: Splits) -> None:
        """Makes the trainer over data that all share; opens nothing yet."""
        config, resume_from = self.spec.config, self.spec.resume_from
        assert isinstance(splits.train, ResidentBatches)
        own = replace(splits, train=PlannedBatches(splits.train, config.seed))
        self.experiment = Experiment.build(config, self.rank_info, own)
        self.trainer = self.experiment.trainer(SilentRecord())
        if resume_from:
            restore(self.trainer, resume_from.content, resume_from.path)
            self.trainer.latest.update(resume_from.content["evaluated"])
            if resume_from.ended_by:
                self.trainer.stop(resume_from.ended_by)
        self.random = random_state()  # in which the run alone would be, since nothing in training draws
        self.record: RunRecord = SilentRecord()

    def begin(self, together: int) -> None:
        """Opens the run's folder and its record."""
        experiment, resume_from = self.experiment, self.spec.resume_from
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resume_from:
            clear(self.folder)
        self.record = self.trainer.metrics_sink = RunRecord(
            self.folder, upto=resume_from.update if resume_from else 0
        )
        train = experiment.splits.train
        self.unequal = inequalities(
            experiment.model.train(), train.batch_size, self.trainer.window.steps, last=train.last
        )
        self._open(experiment, self.record, self.unequal, {})
        self.record.tags[REPLICAS] = str(together)
        self.record.tracker.tag({REPLICAS: str(together)})
        self._summarise(self.record, "RUNNING", {})
        self._attach(self.trainer, self.record)
        for callback in self.trainer.callbacks.values():
            if isinstance(callback, Checkpoints):
                callback.random_state = lambda: self.random

    def end(self, error: Exception | None) -> None:
        """Closes the record of a run that has ended, or failed with `error`."""
        trainer, record = self.trainer, self.record
        status, final = "FAILED", {}
        try:
            if error is None:
                final = {} if trainer.stop_code > 1 else finals(trainer)
                record.tracker.final(final)
                status = "KILLED" if trainer.stop_code > 1 else FINISHED
                record.upload()
            else:
                record.tracker.tag({"accumexp.error": str(error)[:5000] or type(error).__name__})
        finally:
            self.close(status, final, error)

    def close(self, status: str, final: dict[str, float], error: Exception | None = None) -> None:
        monitored = self.trainer.latest.get(self.spec.config.monitor)
        self.record.close(status)
        self._summarise(self.record, status, final, error, None if error else monitored)


class ReplicaRun:
    """The job of a sweep that trains the replicas of `spec` together.

    Those that had finished before are left as they are; the others go on from their checkpoints, those at
    the same update together.
    """

    def __init__(self, spec: RunSpec) -> None:
        assert spec.job is not None
        self.spec = spec
        self.job = spec.job
        self.key = f"replicas={len(spec.replicas)}"
        self.folders = [spec.folder / f"seed={config.seed}" for config in spec.replicas]
        self.stop_code = 0
        self.updates = 0

    def execute(self) -> float | None:
        """The mean monitored value of the replicas; None if one failed.

        Raises:
            UsageError: if they cannot be trained together, before anything is opened.
        """
        with StopSignals() as signals:
            for group in self._groups():
                self._train(group, signals)
                if self.stop_code:
                    break
        ends = [read_whole(folder / SUMMARY) for folder in self.folders]
        done = [end for end in ends if end.get("status") == FINISHED]
        final = mean([end["final"] for end in done])
        values = [end["monitored"] for end in done if end.get("monitored") is not None]
        monitored = statistics.fmean(values) if values and len(done) == len(ends) else None
        if self.stop_code:
            self._summarise("KILLED")
            name = signal.Signals(self.stop_code).name
            console.print(f"stopped by {name} after update {self.updates}", highlight=False)
            sys.exit(128 + self.stop_code)
        failed = len(ends) - len(done)
        error = f"{failed} of {len(ends)} replicas failed" if failed else None
        self._summarise("FAILED" if failed else FINISHED, final, monitored, error)
        said = [_spread(done), *([error] if error else [])]
        console.print(f"{self.job.title}: {', '.join(said)}", highlight=False, soft_wrap=True, markup=False)
        return monitored

    def _groups(self) -> list[list[Replica]]:
        """The replicas that are not finished, by the update they go on from."""
        found: dict[int, list[Replica]] = {}
        for config, folder in zip(self.spec.replicas, self.folders, strict=True):
            before = job_status(folder)
            if before.finished:
                print(f"{self.job.replica(config.seed).title}: finished before", flush=True)
                continue
            resume_from = going_on(before.checkpoint) if before.checkpoint else None
            spec = replace(
                self.spec,
                config=resume_from.config if resume_from else config,
                folder=folder,
                job=self.job.replica(config.seed),
                resume_from=resume_from,
                replicas=[],
            )
            found.setdefault(resume_from.update if resume_from else 0, []).append(Replica(spec, RankInfo()))
        return [found[update] for update in sorted(found)]

    def _train(self, group: Sequence[Replica], signals: StopSignals) -> None:
        config = group[0].spec.config
        splits = shared_splits(config, placement(config, RankInfo()), self.key)
        for replica in group:
            replica.build(splits)
        trainers = [replica.trainer for replica in group]
        together = ReplicaTrainer(trainers, self._displays(trainers))
        check_replicable(together, self.key)
        open_ones = {replica.trainer: replica for replica in group}
        status, failure = "FAILED", None
        try:
            for replica in group:
                replica.begin(len(group))
            self._summarise("RUNNING")
            seeds = ", ".join(str(replica.spec.config.seed) for replica in group)
            console.print(f"{len(group)} runs together, of seeds {seeds}; each:", highlight=False)
            announce(group[0].experiment, trainers[0], group[0].unequal)
            reset_peak_memory(group[0].experiment.device)
            signals.trainer = together

            def ended(trainer: Trainer, error: TrainingError | None) -> None:
                open_ones.pop(trainer).end(error)
                self.stop_code = max(self.stop_code, trainer.stop_code if trainer.stop_code > 1 else 0)

            together.fit(ended)
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        except Exception as error:
            failure = error
            for replica in open_ones.values():
                replica.record.tracker.tag({"accumexp.error": str(error)[:5000] or type(error).__name__})
            raise
        finally:
            self.updates = together.progress.update
            signals.trainer = None
            for replica in open_ones.values():
                replica.close(status, {}, failure)
            if open_ones:
                self._summarise(status)

    def _displays(self, trainers: Sequence[Trainer]) -> list[Callback]:
        """What shows a run's progress, taken from each to show all of them once."""
        found: list[Callback] = []
        for trainer in trainers:
            own = {n: c for n, c in trainer.callbacks.items() if isinstance(c, Progress | LossMonitor)}
            for name in own:
                del trainer.callbacks[name]
            found = found or list(own.values())
        for display in found:
            if isinstance(display, Progress) and self.job.jobs and self.job.jobs > 1:
                display.title = f"job {self.job.turn} of {self.job.jobs}, "
        if self.job.parallel:
            found.append(_Told(ProgressFile(self.spec.folder, trainers[0].total_updates)))
        return found

    def _summarise(
        self,
        status: str,
        final: dict[str, float] | None = None,
        monitored: float | None = None,
        error: str | None = None,
    ) -> None:
        entries: dict[str, Any] = {
            "status": status,
            "error": error,
            "overrides": self.job.overrides,
            "replicas": [folder.name for folder in self.folders],
            "final": final or {},
            "monitored": monitored,
            "launch": self.job.launch,
        }
        write_whole(self.spec.folder / SUMMARY, entries)


class _Told(Callback):
    """Keeps the job's `progress.json`."""

    def __init__(self, file: ProgressFile) -> None:
        self.file = file

    def logged(self, trainer: Any, values: dict[str, float]) -> None:
        self.file.tell(trainer.progress.update, values)


def _spread(ends: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over the finished replicas, in a line."""
    if not ends:
        return "no replica finished"
    said = []
    for key in ("accuracy", "loss"):
        values = [end["final"][key] for end in ends if key in end["final"]]
        if values:
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            said.append(f"test {key} {statistics.fmean(values):.4f}{spread}")
    updates, seconds = (max(end["final"][key] for end in ends) for key in ("updates", "seconds"))
    return f"{', '.join(said)} over {len(ends)} seeds, {updates:.0f} updates in {duration(seconds)}"
