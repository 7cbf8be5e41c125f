"""accumexp's own training loop: the Trainer that `accumexp.run` builds, with all that a run records."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import ClassVar

from omegaconf import open_dict

from accumexp.tracking.run_folder import RunStatus
from accumexp.training.callbacks import Callback
from accumexp.training.trainer import Trainer

from .loops import Loop
from .tasks import SEED, Task


class StopAtUpdate(Callback):
    """Stops `fit` after an update, as a signal does; the same Trainer then continues with the next epoch."""

    def __init__(self) -> None:
        self.update = 0

    def update_end(self, trainer: Trainer) -> None:
        if trainer.progress.update == self.update:
            trainer.stop("end of the round")


@cache
def _store() -> tempfile.TemporaryDirectory[str]:
    """The folder of the database of all runs of this process: creating one takes seconds."""
    return tempfile.TemporaryDirectory()


class Accumexp(Loop):
    """The Trainer that `accumexp.run` builds, with its metrics, its journal and its MLflow run."""

    name = "accumexp"
    # Overrides beyond those of every loop.
    overrides: ClassVar[tuple[str, ...]] = ()
    tracked: ClassVar[bool] = True

    def __init__(self, task: Task) -> None:
        from hydra import compose, initialize_config_dir

        from accumexp.conf import conf_dir
        from accumexp.config.loading import from_hydra
        from accumexp.config.schema import TrackingConfig
        from accumexp.data.digest import dataset_records
        from accumexp.tracking import Store
        from accumexp.tracking.record import RunRecord, create_tracker
        from accumexp.tracking.run_folder import RunFolder
        from accumexp.training.experiment import Experiment

        self.task = task
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        overrides = [
            *task.overrides(),
            "optimizer.lr=0.01",
            f"accum.micro_batch_size={task.micro_batch}",
            f"accum.steps={task.steps}",
            "data.eval_fraction=0",
            "callbacks=none",
            "+callbacks.stop._target_=benchmarks.accumexp_loop.StopAtUpdate",
            "trainer.epochs=1000000",
            "trainer.eval_every=1000000",
            f"trainer.deterministic={str(task.deterministic).lower()}",
            f"device={task.device}",
            f"seed={SEED}",
            *self.overrides,
        ]
        if self.tracked:
            overrides += [
                f"tracking.uri=sqlite:///{_store().name}/mlflow.db",
                # Its thread would run in every loop's epochs.
                "tracking.system_metrics=false",
                # By the clock of this loop alone, see `flush`.
                "tracking.flush_seconds=1000000",
            ]
        else:
            overrides.append("tracking=none")
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            cfg = compose("config", overrides)
        samples = {"_target_": "benchmarks.tasks.Samples", "model": task.model, "samples": task.samples}
        with open_dict(cfg):
            cfg.data.train, cfg.data.eval = samples, None
            cfg.data.test = samples | {"samples": 1}
        config = from_hydra(cfg)
        experiment = Experiment.build(config)
        run_folder = RunFolder(folder)
        self.record = RunRecord(run_folder)
        try:
            self.trainer = experiment.trainer(self.record)
        except BaseException:
            self.close(RunStatus.FAILED)
            raise
        self.model, self.optimizer = experiment.model, self.trainer.optimizer
        run_folder.write_config(config)
        self.record.tracker = create_tracker(
            config,
            run_folder,
            Store(config.tracking) if self.tracked else None,
            name="benchmark",
            command="python -m benchmarks.window",
            tags={},
            datasets=dataset_records(vars(config.data), experiment.splits),
        )
        stop = self.trainer.callbacks["stop"]
        assert isinstance(stop, StopAtUpdate)
        self.stop = stop
        self._flush_seconds = TrackingConfig().flush_seconds
        self._log_every = self.trainer.options.log_every

    @property
    def logged(self) -> int:
        return self.trainer.progress.update // self._log_every

    def epoch(self) -> None:
        self.stop.update = self.trainer.progress.update + self.task.updates
        self.trainer.clear_stop()
        self.trainer.fit()

    def flush(self, training_seconds: float) -> float:
        if training_seconds < self._flush_seconds:
            return 0.0
        start = perf_counter()
        self.record.flush()
        return perf_counter() - start

    def close(self, status: RunStatus = RunStatus.FINISHED) -> None:
        self.record.close(status)
        self._folder.cleanup()


class Untracked(Accumexp):
    """The same without MLflow: metrics and journal only."""

    name = "accumexp, tracking=none"
    tracked = False


class Graphed(Untracked):
    """The same with its windows and steps replayed as CUDA graphs."""

    name = "accumexp, trainer.graph=true"
    overrides = ("trainer.graph=true",)
