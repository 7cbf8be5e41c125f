"""The trainer's update as a proof takes any loop's: a function of model, optimizer, batch and steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from ..accum.batch import batch_size, map_tensors, rank_share, steps_for
from ..data import Batch
from ..proof.problem import Batch as Whole
from ..training.experiment import Experiment
from ..training.trainer import Trainer


class TrainerLoop:
    """`Trainer.update` on whatever model and optimizer it is called with, on this rank's share.

    Another model begins a new trainer, and the one before is forgotten, with its loss scale.

    Args:
        clip_norm: instead of the configuration's.
    """

    def __init__(self, experiment: Experiment, clip_norm: float | None = None) -> None:
        self.experiment = experiment
        self.clip_norm = clip_norm or experiment.config.trainer.clip_norm
        # The newest alone: each has a model, gradients and optimizer state of its own.
        self._newest: Trainer | None = None
        self._model: nn.Module | None = None

    def __call__(
        self, model: nn.Module, optimizer: Optimizer, batch: Whole, steps: int, schedule: Any
    ) -> float | None:
        """One update; the loss that is logged of it."""
        if self._newest is None or self._model is not model:
            self._newest, self._model = self._trainer(model, optimizer, schedule), model
        trainer = self._newest
        trainer.update(self._share(batch, steps))
        trainer.read()
        metrics_sink = trainer.metrics_sink
        assert isinstance(metrics_sink, _Last)
        return metrics_sink.loss

    def _trainer(self, model: nn.Module, optimizer: Optimizer, schedule: Any) -> Trainer:
        trainer = Trainer(
            self.experiment.window(model),
            optimizer,
            schedule,
            self.experiment.splits,
            self.experiment.evaluator,
            MetricCollection({}),
            _Last(),
            {},
            device=self.experiment.device,
            epochs=1,
            log_every=2**62,
            clip_norm=self.clip_norm,
            check_finite=False,
            recover=self.experiment.config.accum.recovers,
        )
        trainer.total_updates = 2**62
        return trainer

    def _share(self, batch: Whole, steps: int) -> Batch:
        total = batch_size(batch)
        # A batch that is smaller than the run's has fewer micro-batches.
        steps = steps_for(total, self.experiment.splits.train.batch_size, steps)
        rank_info = self.experiment.rank_info
        parts = rank_share(total, steps, rank_info.rank, rank_info.size)
        own = torch.cat([torch.arange(part.start, part.stop) for part in parts]).to(self.experiment.device)
        held = own if len(own) else own.new_zeros(1)

        def take(tensor: Tensor) -> Tensor:
            return tensor[held]

        inputs, targets = (map_tensors(take, part) for part in batch)
        return Batch(inputs, targets, held, len(own), total, steps)


class _Last:
    """A recorder of the newest loss alone."""

    def __init__(self) -> None:
        self.loss: float | None = None

    def record(self, update: int, values: Mapping[str, float], publish: bool) -> None:
        self.loss = values.get("train/loss", self.loss)
