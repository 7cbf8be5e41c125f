"""accumexp as a contender: the Trainer that `accumexp.run` builds, with all that a run records."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from time import perf_counter

from omegaconf import open_dict

from accumexp.training.callbacks import Callback
from accumexp.training.trainer import Trainer

from .contenders import Contender
from .tasks import SEED, Task


class StopAtUpdate(Callback):
    """Ends `fit` as a signal does, so that the same Trainer goes on with the next epoch."""

    def __init__(self) -> None:
        self.update = 0

    def update_end(self, trainer: Trainer) -> None:
        if trainer.progress.update == self.update:
            trainer.stop("end of the round")


@cache
def _store() -> tempfile.TemporaryDirectory[str]:
    """Where this process's runs are recorded; making a database takes seconds, so all have one."""
    return tempfile.TemporaryDirectory()


class Accumexp(Contender):
    """The Trainer that `accumexp.run` builds, with its metrics, its journal and its MLflow run."""

    name = "accumexp"

    def __init__(self, task: Task) -> None:
        from hydra import compose, initialize_config_dir

        from accumexp.cli import conf_dir
        from accumexp.config.loading import from_hydra
        from accumexp.config.schema import TrackingConfig
        from accumexp.run.record import RunRecord, open_tracker, write_config
        from accumexp.run.spec import RunSpec
        from accumexp.tracking import Store
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
            "+callbacks.stop._target_=benchmarks.ours.StopAtUpdate",
            "trainer.epochs=1000000",
            "trainer.eval_every=1000000",
            f"trainer.deterministic={str(task.deterministic).lower()}",
            f"tracking.uri=sqlite:///{_store().name}/mlflow.db",
            # Its thread would run in every contender's epochs.
            "tracking.system_metrics=false",
            # Others' time must not count towards the next flush: `flush` is told this one's.
            "tracking.flush_seconds=1000000",
            f"device={task.device}",
            f"seed={SEED}",
        ]
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            cfg = compose("config", overrides)
        samples = {"_target_": "benchmarks.tasks.Samples", "model": task.model, "samples": task.samples}
        with open_dict(cfg):
            cfg.data.train, cfg.data.eval = samples, None
            cfg.data.test = samples | {"samples": 1}
        config = from_hydra(cfg)
        experiment = Experiment.build(config)
        self.record = RunRecord(folder)
        self.trainer = experiment.trainer(self.record)
        self.model, self.optimizer = experiment.model, self.trainer.optimizer
        write_config(folder, config)
        order = RunSpec(config, folder, None, None, "python -m benchmarks.window")
        self.record.tracker = open_tracker(order, Store(config.tracking), experiment, {}, None, None)
        stop = self.trainer.callbacks["stop"]
        assert isinstance(stop, StopAtUpdate)
        self.stop = stop
        self._flush_seconds = TrackingConfig().flush_seconds
        self._log_every = self.trainer.log_every

    @property
    def logged(self) -> int:
        return self.trainer.progress.update // self._log_every

    def epoch(self) -> None:
        self.stop.update = self.trainer.progress.update + self.task.updates
        self.trainer.go_on()
        self.trainer.fit()

    def flush(self, own_seconds: float) -> float:
        if own_seconds < self._flush_seconds:
            return 0.0
        start = perf_counter()
        self.record.flush()
        return perf_counter() - start

    def close(self) -> None:
        self.record.close("FINISHED")
        self._folder.cleanup()
