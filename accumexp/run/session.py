"""The life of a run, or of one rank's part of it: built, opened, trained, closed."""

from __future__ import annotations

import gc
import logging
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from ..accum import Inequality, inequalities
from ..config.environment_values import hide_values, recorded
from ..config.schema import Backend
from ..data import Splits
from ..data.digest import dataset_records
from ..environment.console import console, print_line, result
from ..environment.memory import reset_peak_memory
from ..environment.ranks import RankInfo, barrier
from ..environment.signals import StopSignals, exit_code_of
from ..errors import TrainingError, masked
from ..plan.auto_steps import choose_steps
from ..tracking import Store, reopen
from ..tracking.json_file import written
from ..tracking.metrics_file import ProgressFile
from ..tracking.model_inputs import described_inputs
from ..tracking.record import (
    RunRecord,
    create_tracker,
    describing_tags,
    inequality_tag,
    upload_certificate,
)
from ..tracking.run_folder import CERTIFICATE_TAG, RunStatus, Summary
from ..training.callbacks import RunState
from ..training.checkpoint import saved_updates
from ..training.checkpoint_parts import needed_trust
from ..training.experiment import Experiment
from ..training.preflight import check_experiment
from ..training.progress import Progress
from ..training.restore_changed import restore_changed
from ..training.run_context import run_context
from .messages import announce, final_values, show_summary, warn
from .spec import RunSpec
from .upload import upload

log = logging.getLogger(__name__)
# Seconds that a rank waits for the others after a stop signal; they may have died.
STOP_DEADLINE = 10.0


class Run:
    """A run in this process, or one rank's part of it.

    `execute` does all of it. Runs that are trained together are built, opened and closed one by one.

    Attributes:
        experiment, trainer: made by `build`.
        model_inputs: the signature and the input example of the run's models.
        record: opened by `open`; until then, and on all ranks but the first, it keeps nothing.
    """

    experiment: Experiment
    model_inputs: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, spec: RunSpec, rank_info: RankInfo) -> None:
        self.spec = spec
        self.job = spec.job
        self.rank_info = rank_info
        self.folder = spec.folder
        self.record = RunRecord()
        hide_values(spec.config, spec.from_environment)

    @property
    def recorded(self) -> dict[str, Any]:
        """The configuration as it is kept: values from the environment as their expressions."""
        return recorded(self.spec.config, self.spec.from_environment)

    @property
    def interrupted(self) -> bool:
        """Whether a signal has stopped the training."""
        return self.trainer.stop_code > 1

    def execute(self) -> float | None:
        """Trains, evaluates, records and returns the monitored value. A stop signal raises SystemExit."""
        rank_info = self.rank_info
        deadline = STOP_DEADLINE if rank_info.size > 1 else None
        context = run_context(self.spec.config, self.spec.folder, rank_info)
        with StopSignals(deadline) as signals, context as self.folder, closing(self):
            resuming = self.spec.resume_from is not None
            config, tags = choose_steps(self.spec.config, rank_info, resuming)
            self.spec = replace(self.spec, config=config)
            tags = {**tags, **self._certify()}
            self.build()
            self.open(tags)
            with self.closed_on_error():
                self.attach()
                if self.job and self.job.parallel and rank_info.first:
                    self.record.progress = ProgressFile(self.folder.progress, self.trainer.total_updates)
                    self.record.progress.write(self.trainer.progress.update, self.trainer.latest)
                announce(self.experiment, self.trainer, self.unequal)
                reset_peak_memory(self.experiment.device)
                signals.trainer = self.trainer
                self.trainer.fit()
                final, best = self.finish()
        if self.interrupted:
            self._exit_interrupted()
        if rank_info.first and self.job:
            monitor = self.spec.config.monitor
            print_line(f"{self.job.title}: {result(final, monitor)}", markup=False)
        elif rank_info.first:
            monitor = self.spec.config.monitor
            show_summary(final, best, self.trainer, self.record.tracker, self.folder, monitor)
        return self.monitored

    def close(self) -> None:
        """Ends the processes that read the data."""
        if "experiment" in vars(self):
            self.experiment.splits.close()

    def _certify(self) -> dict[str, str]:
        """With `prove=true`, the tags of the certificate of a run that is new or resumed with changes."""
        resume_from = self.spec.resume_from
        if not self.spec.config.prove or resume_from and not resume_from.changes:
            return {}
        from ..prove.session import certified

        tags = certified(self.spec.config, self.rank_info, self.folder, self.spec.from_environment)
        # The models of the proof are in reference cycles with their hooks.
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return tags

    def build(self, splits: Splits | None = None) -> None:
        """Makes the experiment and its trainer, restored from a checkpoint; several runs share `splits`."""
        resume_from = self.spec.resume_from
        self.experiment = Experiment.build(self.spec.config, self.rank_info, splits)
        outputs = check_experiment(self.experiment, resume_from.changes if resume_from else ())
        example = self.experiment.splits.train.example
        if example is not None:
            ragged = bool(self.spec.config.data.collate)
            self.model_inputs = described_inputs(example[0], outputs, ragged)
        if not resume_from:
            self.trainer = self.experiment.trainer(self.record)
        else:
            progress = Progress(**resume_from.content["progress"])
            updates = self.experiment.options.total_updates(len(self.experiment.splits.train), progress)
            self.trainer = self.experiment.trainer(self.record, updates)
            restore_changed(self.trainer, resume_from.content, resume_from.path, resume_from.changes)
            self.trainer.latest.update(resume_from.content["evaluated"])
            if resume_from.ended_by:
                self.trainer.stop(resume_from.ended_by)

    def open(self, tags: Mapping[str, str]) -> None:
        """Opens the record of the run in its folder and in the tracker, with `tags` added to its own."""
        trainer = self.trainer
        self.experiment.model.train()
        self.unequal = self._inequalities(trainer.window.steps)
        if not self.rank_info.first:
            return
        resume_from = self.spec.resume_from
        self.record = trainer.log.sink = RunRecord(self.folder, resume_from.update if resume_from else 0)
        self.record.tags = {**describing_tags(self.experiment.device, self.unequal), **tags}
        self._open_tracker()
        self._summarise(RunStatus.RUNNING)
        trainer.out_of_memory.listeners.append(self._split_finer)
        self.record.tag(trainer.out_of_memory.tags)

    def _open_tracker(self) -> None:
        config, resume_from, job, record = self.spec.config, self.spec.resume_from, self.job, self.record
        if resume_from:
            record.tracker = reopen(
                config.tracking, resume_from.content["run"], resume_from.changes, self.folder
            )
            record.tracker.tag({**config.tracking.tags, **record.tags, **resume_from.tags()})
            self.folder.write_config(self.recorded)
            if CERTIFICATE_TAG in record.tags:
                upload_certificate(record.tracker, self.folder)
            return
        if job:
            job.same_store(config.tracking)  # another job may have begun the sweep since
        store = None if config.tracking.backend is Backend.none else Store(config.tracking)
        self.folder.write_config(self.recorded)
        record.tracker = create_tracker(
            config,
            self.folder,
            store,
            # MLflow would draw a name from the run's seed: the same one for all runs of a seed.
            name=job.run_name if job else self.folder.path.name,
            command=self.spec.command,
            tags=record.tags,
            datasets=dataset_records(self.recorded["data"], self.experiment.splits),
            recorded=self.recorded,
            overrides=job.overrides if job else None,
            parent=job.parent(store) if job else None,
        )
        if CERTIFICATE_TAG in record.tags:
            upload_certificate(record.tracker, self.folder)

    def attach(self) -> None:
        """Gives the callbacks that save the run's folder and record."""
        job, trainer = self.job, self.trainer
        if job and job.jobs:
            trainer.title = f"job {job.turn} of {job.jobs}, "
        identity = {
            "config": self.recorded,
            "interpolations": self.spec.interpolations,
            "run": self.record.tracker.identity(),
        }
        saved = bool(self.spec.resume_from and self.spec.resume_from.ended_by)
        run = RunState(self.folder.path, identity, self.record.flush, saved)
        for callback in trainer.callbacks.values():
            callback.run_opened(trainer, run)

    def finish(self) -> tuple[dict[str, float], dict[str, float]]:
        """Evaluates on the test split and closes the record; returns `final_values`, empty after a signal."""
        final, best = ({}, {}) if self.interrupted else final_values(self.trainer, self.folder.best)
        if self.rank_info.first:
            self.record.flush()
            upload(self.record.tracker, self.folder, self.model_inputs, self.spec.config)
        of_best = {f"best_{key}": value for key, value in best.items()}
        self.record.tracker.final({**final, **of_best})  # last: a run killed in the upload has not ended
        self._close(RunStatus.KILLED if self.interrupted else RunStatus.FINISHED, final=final, best=best)
        return final, best

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Closes the record if the body raises: KILLED after a signal, FAILED after any other exception."""
        try:
            yield
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Closes the record after an exception. What cannot be recorded of it is a line, no other error."""
        try:
            self._record_failure(error)
        except (OSError, TrainingError) as unrecorded:
            log.warning("the end of the run is not recorded: %s", unrecorded)

    def _record_failure(self, error: BaseException) -> None:
        if not isinstance(error, Exception):
            self._close(RunStatus.KILLED)
            return
        reason = masked(str(error)) or type(error).__name__
        self.record.tracker.tag({"accumexp.error": reason[:5000]})
        self._close(RunStatus.FAILED, error=reason)

    @property
    def monitored(self) -> float | None:
        """The newest value of the monitored metric."""
        return self.trainer.latest.get(self.spec.config.monitor)

    def _close(self, status: RunStatus, **values: Any) -> None:
        self.record.close(status)
        self._summarise(status, **values)

    def _summarise(self, status: RunStatus, **values: Any) -> None:
        ended = status in (RunStatus.FINISHED, RunStatus.KILLED)
        summary = Summary(
            status,
            overrides=self.job.overrides if self.job else self.spec.overrides,
            seed=self.spec.config.seed,
            run_id=self.record.tracker.run_id,
            monitored=self.monitored if ended else None,
            launch=self.job.launch if self.job else 0,
            tags=self.record.tags,
            **values,
        )
        with written(self.folder.summary_file):
            self.record.summarise(summary)

    def _split_finer(self, tags: Mapping[str, str]) -> None:
        """Tags a window that ran out of memory, and warns if the finer split is not the larger batch."""
        rank_samples = -(-self.experiment.splits.train.batch_size // self.rank_info.size)
        unequal = self._inequalities(self.trainer.out_of_memory.steps_of(rank_samples))
        warn(unequal)
        self.record.tag({**tags, **inequality_tag(unequal)})

    def _inequalities(self, steps: int) -> list[Inequality]:
        """Why a window of `steps` micro-batches is not the larger batch."""
        model, train = self.experiment.model, self.experiment.splits.train
        return inequalities(model, train.batch_size, steps, ranks=self.rank_info.size, last=train.last)

    def _exit_interrupted(self) -> None:
        # As soon as one rank ends, the launcher stops the others, which may still be saving.
        barrier(self.rank_info)
        trainer = self.trainer
        text = f"stopped by {signal.Signals(trainer.stop_code).name} after update {trainer.progress.update}"
        if not self.job and saved_updates(self.folder.checkpoints):
            command = f"python -m accumexp.run resume={self.folder.path}"
            text += f"; go on with\n  {command}{needed_trust(self.recorded)}"
        console.print(text, highlight=False, soft_wrap=True)
        sys.exit(exit_code_of(trainer.stop_code))
