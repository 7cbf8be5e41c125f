"""One run in this process: the whole of it, or one rank's part, from its order to its summary."""

from __future__ import annotations

import dataclasses
import gc
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from ..accum import Inequality, inequalities
from ..config.loading import to_plain
from ..config.schema import Backend, LossScaling, Strategy
from ..environment.console import console, duration, result, show_values
from ..environment.device import device_name, pick_device
from ..environment.memory import MIB, reset_peak_memory
from ..environment.ranks import RankInfo, barrier, broadcast_from_first, device_of, process_group
from ..environment.signals import StopSignals
from ..plan.auto_steps import choose_steps
from ..sweeps.sweep import SweepJob
from ..tracking import Store, reopen
from ..tracking.certificates import CERTIFICATE, TAG
from ..tracking.journal import ProgressFile
from ..training.checkpoint import BEST, FOLDER, Checkpoints, restore, saved_updates
from ..training.experiment import Experiment
from ..training.progress_display import Progress
from ..training.trainer import Trainer
from .record import RunRecord, SilentRecord, described, open_tracker, why_unequal, write_config
from .spec import RunSpec

# Seconds that a rank may wait for others that are gone, after it was told to stop.
SIGNAL_DEADLINE = 10.0


@dataclass
class Run:
    """A run about to happen, in this process: the whole of it, or one rank's part."""

    spec: RunSpec
    rank_info: RankInfo

    def __post_init__(self) -> None:
        self.folder = self.spec.folder

    def execute(self) -> float | None:
        config, resume_from, rank_info = self.spec.config, self.spec.resume_from, self.rank_info
        if not rank_info.first:
            console.quiet = True
        with StopSignals(SIGNAL_DEADLINE if rank_info.size > 1 else None) as signals, self._joined():
            # Under torchrun the others composed a folder of their own, but checkpoints may have many writers.
            self.folder = Path(broadcast_from_first(str(self.folder), rank_info))
            config, how = choose_steps(self.spec.config, rank_info, self.spec.resume_from is not None)
            self.spec = dataclasses.replace(self.spec, config=config)
            proved: dict[str, str] = {}
            if config.prove and not resume_from:
                from ..prove.session import certified

                proved = certified(config, rank_info, self.folder)
                # What the proof left in memory is not the run's: its models are in cycles with their hooks.
                gc.collect()
                if torch.cuda.is_initialized():
                    torch.cuda.empty_cache()
            experiment = Experiment.build(config, rank_info)
            record = (
                RunRecord(self.folder, upto=resume_from.update if resume_from else 0)
                if rank_info.first
                else SilentRecord()
            )
            trainer = experiment.trainer(record)
            if resume_from:
                restore(trainer, resume_from.content, resume_from.path)
                trainer.latest.update(resume_from.content["evaluated"])
            if self.job and self.job.parallel and rank_info.first:
                record.progress = ProgressFile(self.folder, trainer.total_updates)
                record.progress.tell(trainer.progress.update, trainer.latest)
            train, steps = experiment.splits.train, trainer.window.steps
            unequal = inequalities(
                experiment.model.train(), train.batch_size, steps, ranks=rank_info.size, last=train.last
            )
            if rank_info.first:
                self._open(experiment, record, unequal, {**how, **proved})
                trainer.out_of_memory.listeners.append(
                    lambda tags: split_finer(trainer, experiment, record, tags)
                )
                record.tag(trainer.out_of_memory.tags)
            status, final = "FAILED", {}
            try:
                self._attach(trainer, record)
                announce(experiment, trainer, unequal)
                reset_peak_memory(experiment.device)
                if resume_from and resume_from.ended_by:
                    trainer.stop(resume_from.ended_by)
                signals.trainer = trainer
                trainer.fit()
                interrupted = trainer.stop_code > 1
                final = {} if interrupted else finals(trainer)
                record.tracker.final(final)
                status = "KILLED" if interrupted else "FINISHED"
                record.upload()
            except (KeyboardInterrupt, SystemExit):
                status = "KILLED"
                raise
            except Exception as error:
                self._summarise(record, status, {}, error)
                record.tracker.tag({"accumexp.error": str(error)[:5000] or type(error).__name__})
                raise
            finally:
                record.close(status)
            monitored = trainer.latest.get(config.monitor)
            self._summarise(record, status, final, monitored=monitored)
        if interrupted:
            # The launcher would stop a first rank that is still saving as soon as another ends.
            barrier(rank_info)
            stopped_by = signal.Signals(trainer.stop_code).name
            text = f"stopped by {stopped_by} after update {trainer.progress.update}"
            if not self.job and saved_updates(self.folder / FOLDER):
                text += f"; go on with\n  python -m accumexp.run resume={self.folder}"
            console.print(text, highlight=False, soft_wrap=True)
            sys.exit(128 + trainer.stop_code)
        if rank_info.first:
            self._show(final, record, trainer)
        return monitored

    @property
    def job(self) -> SweepJob | None:
        return self.spec.job

    def _joined(self) -> AbstractContextManager[None]:
        config = self.spec.config
        if config.accum.strategy is Strategy.standalone:
            return nullcontext()
        return process_group(self.rank_info, str(pick_device(device_of(config.device, self.rank_info))))

    def _open(
        self,
        experiment: Experiment,
        record: RunRecord,
        unequal: list[Inequality],
        known: dict[str, str],
    ) -> None:
        config, resume_from = self.spec.config, self.spec.resume_from
        record.tags = {**described(experiment, unequal), **known}
        if resume_from:
            record.tracker = reopen(config.tracking, resume_from.content["run"])
            record.tracker.tag(resume_from.tags())
            write_config(self.folder, config)
            self._summarise(record, "RUNNING", {})
            return
        if self.job:
            self.job.same_store(config.tracking)
        store = None if config.tracking.backend is Backend.none else Store(config.tracking)
        write_config(self.folder, config)
        parent = self.job.parent(store) if self.job else None
        # A name that MLflow makes is drawn from the run's seed: the same for all runs of a seed.
        name = self.job.name if self.job else self.folder.name
        record.tracker = open_tracker(self.spec, store, experiment, record.tags, name, parent)
        if TAG in known:
            record.tracker.artifact(self.folder / CERTIFICATE)
        self._summarise(record, "RUNNING", {})

    def _attach(self, trainer: Trainer, record: RunRecord) -> None:
        identity = {"config": to_plain(self.spec.config), "run": record.tracker.identity()}
        for callback in trainer.callbacks.values():
            if isinstance(callback, Checkpoints):
                callback.attach(self.folder, identity, record.flush)
                if self.spec.resume_from and self.spec.resume_from.ended_by:
                    callback.know_saved(trainer)
            if isinstance(callback, Progress) and self.job and self.job.jobs:
                callback.title = f"job {self.job.turn} of {self.job.jobs}, "

    def _summarise(
        self,
        record: RunRecord,
        status: str,
        final: dict[str, float],
        error: Exception | None = None,
        monitored: float | None = None,
    ) -> None:
        record.summarise(
            status=status,
            error=None if error is None else str(error) or type(error).__name__,
            overrides=self.job.overrides if self.job else [],
            seed=self.spec.config.seed,
            run_id=record.tracker.run_id,
            final=final,
            monitored=monitored,
            launch=self.job.launch if self.job else 0,
            tags=record.tags,
        )

    def _show(self, final: dict[str, float], record: RunRecord, trainer: Trainer) -> None:
        if self.job:
            console.print(f"{self.job.title}: {result(final)}", highlight=False, soft_wrap=True, markup=False)
            return
        tracker = record.tracker
        values: dict[str, object] = {}
        if "accuracy" in final:
            values["test accuracy"] = f"{final['accuracy']:.4f}"
        values["test loss"] = f"{final['loss']:.4f}"
        values["updates"] = f"{trainer.progress.update} in {duration(trainer.progress.seconds)}"
        speed, rate = final["update_ms"], final["samples_per_second"]
        values["speed"] = f"{speed:.2f} ms an update, {rate:.0f} samples/s"
        values["memory"] = f"{final['activation_mib']:.2f} MiB of activations"
        if "peak_memory_mib" in final:
            values["memory"] += f", {final['peak_memory_mib']:.0f} MiB at the peak"
        if trainer.out_of_memory.lines:
            values["out of memory"] = trainer.out_of_memory.lines[-1]
        if trainer.stop_reason:
            values["ended by"] = trainer.stop_reason
        values["folder"] = self.folder
        best = self.folder / FOLDER / BEST
        if best.exists():
            values["best model"] = best
        if tracker.run_id:
            values["run"] = tracker.run_id
            values["UI"] = tracker.address
        if tracker.ui_command:
            values["serve it with"] = tracker.ui_command
        show_values("summary", values)


def announce(experiment: Experiment, trainer: Trainer, unequal: list[Inequality]) -> None:
    """One line of what is about to happen, and a warning where the window cannot be the larger batch."""
    config, rank_info = experiment.config, experiment.rank_info
    steps, batch = trainer.window.steps, experiment.splits.train.batch_size
    window = f"{steps} micro-batches of {config.accum.micro_batch_size}" if steps > 1 else "one micro-batch"
    if rank_info.size > 1:
        window += f" on each of {rank_info.size} ranks"
    numbers = config.precision.name if config.precision else ""
    if config.accum.loss_scale is not LossScaling.none:
        numbers = f"loss-scaled {numbers}"
    console.print(
        f"{config.model['_target_'].rpartition('.')[2]} on {experiment.splits.train.samples} samples, "
        f"{trainer.total_updates} updates of {batch} samples in {window}, {numbers} "
        f"on {experiment.device} ({device_name(experiment.device)})",
        highlight=False,
        soft_wrap=True,
    )
    warn(unequal)


def warn(unequal: list[Inequality]) -> None:
    for found in unequal[:3]:
        console.print(f"not the larger batch: {found.module} ({found.kind}): {found.reason}", style="yellow")
    if len(unequal) > 3:
        console.print(f"not the larger batch: and {len(unequal) - 3} more modules like these", style="yellow")


def split_finer(trainer: Trainer, experiment: Experiment, record: RunRecord, tags: dict[str, str]) -> None:
    """Tells the record of a window that ran out of memory, and whether what follows is the larger batch."""
    train, ranks = experiment.splits.train, trainer.window.sync.ranks.size
    steps = trainer.out_of_memory.steps_of(-(-train.batch_size // ranks))
    unequal = inequalities(experiment.model, train.batch_size, steps, ranks=ranks, last=train.last)
    warn(unequal)
    record.tag({**tags, **why_unequal(unequal)})


def finals(trainer: Trainer) -> dict[str, float]:
    """What `final/*` holds: the test split's values and what the run cost."""
    tested = {key.removeprefix("test/"): value for key, value in trainer.evaluate("test").items()}
    progress = trainer.progress
    seconds = max(progress.seconds, 1e-9)
    final = {
        **tested,
        **{key.replace("eval/", "eval_"): v for key, v in trainer.latest.items() if key.startswith("eval/")},
        "test_samples": float(trainer.splits.test.samples),
        "updates": float(progress.update),
        "epochs": float(progress.epoch),
        "samples": float(progress.samples),
        "seconds": progress.seconds,
        "samples_per_second": progress.samples / seconds,
        "update_ms": 1e3 * seconds / max(progress.update, 1),
        "activation_mib": progress.activation_bytes / MIB,
    }
    if "perf/peak_memory_mib" in trainer.latest:
        final["peak_memory_mib"] = trainer.latest["perf/peak_memory_mib"]
    return final
