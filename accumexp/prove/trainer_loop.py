"""The trainer's update as the function of model, optimizer, batch and steps that a proof calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..accum.batch import batch_size, rank_share, steps_for
from ..data import Batch
from ..proof.compilation import compile_forward
from ..proof.problem import WholeBatch, rows
from ..training.experiment import Experiment
from ..training.metrics import Metrics
from ..training.metrics_sink import MemoryMetricsSink
from ..training.progress import LoopOptions
from ..training.trainer import Trainer


class TrainerLoop:
    """`Trainer.update` with any model and optimizer, on this rank's share of a batch.

    A call with another model builds a new trainer and releases the one before, with its loss scale.

    Args:
        clip_norm: instead of the configuration's.
    """

    def __init__(self, experiment: Experiment, clip_norm: float | None = None) -> None:
        self.experiment = experiment
        self.clip_norm = clip_norm or experiment.config.trainer.clip_norm
        # Only the newest is kept, because each holds a model, gradients and optimizer state.
        self._trainer: Trainer | None = None
        self._model: nn.Module | None = None

    def __call__(
        self, model: nn.Module, optimizer: Optimizer, batch: WholeBatch, steps: int, schedule: Any
    ) -> float | None:
        """Makes one update; returns the loss that the trainer logs for it."""
        if self._trainer is None or self._model is not model:
            self._trainer, self._model = self._build(model, optimizer, schedule), model
        self._trainer.update(self._share(batch, steps))
        self._trainer.read()
        sink = self._trainer.log.sink
        assert isinstance(sink, MemoryMetricsSink)
        _, values, _ = sink.rows.pop()
        return values.get("train/loss")

    def _build(self, model: nn.Module, optimizer: Optimizer, schedule: Any) -> Trainer:
        # No update is the last one, and none is published.
        options = LoopOptions(
            epochs=2**62,
            log_every=2**62,
            clip_norm=self.clip_norm,
            clip_value=self.experiment.config.trainer.clip_value,
            check_finite=False,
            recover=self.experiment.config.accum.recovers,
        )
        window = self.experiment.window(model)
        compile_as_run(self.experiment, window.model)
        return Trainer(
            window,
            optimizer,
            schedule,
            self.experiment.splits,
            self.experiment.evaluator,
            Metrics({}),
            MemoryMetricsSink(),
            {},
            options,
        )

    def _share(self, batch: WholeBatch, steps: int) -> Batch:
        total = batch_size(batch)
        # A batch that is smaller than the run's has fewer micro-batches.
        steps = steps_for(total, self.experiment.splits.train.batch_size, steps)
        rank_info = self.experiment.rank_info
        parts = rank_share(total, steps, rank_info.rank, rank_info.size)
        share = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        # A rank without samples computes on one as padding.
        indices = (share if len(share) else share.new_zeros(1)).to(self.experiment.device)
        return Batch(*rows(batch, indices), indices, len(share), total, steps)


def compile_as_run(experiment: Experiment, model: nn.Module) -> None:
    """Compiles `model`, which a loop under test trains, if the run does and `model` is in its precision."""
    dtype = next(experiment.model.parameters()).dtype
    if experiment.config.trainer.compile and next(model.parameters()).dtype is dtype:
        compile_forward(model)
