"""The trainer's update as a proof takes any loop's: a function of model, optimizer, batch and steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MetricCollection

from ..accum.batch import batch_size, map_tensors, rank_share, steps_for
from ..config.schema import Config
from ..data import Batch
from ..environment.ranks import RankInfo
from ..proof.problem import WholeBatch
from ..training.experiment import Parts, build_window
from ..training.trainer import Trainer


class TrainerLoop:
    """`Trainer.update` on whatever model and optimizer it is called with, on this rank's share.

    Another model begins a new trainer, and the one before is forgotten, with its loss scale.

    Args:
        full: samples in a whole batch; a smaller one has fewer micro-batches.
        clip_norm: instead of the configuration's.
    """

    def __init__(
        self, config: Config, parts: Parts, rank_info: RankInfo, full: int, clip_norm: float | None = None
    ) -> None:
        self.config = config
        self.parts = parts
        self.rank_info = rank_info
        self.full = full
        self.clip_norm = clip_norm or config.trainer.clip_norm
        # The newest alone: each has a model, gradients and optimizer state of its own.
        self._newest: Trainer | None = None
        self._model: nn.Module | None = None

    def __call__(
        self, model: nn.Module, optimizer: Optimizer, batch: WholeBatch, steps: int, schedule: Any
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
            build_window(self.config.accum, model, self.parts),
            optimizer,
            schedule,
            self.parts.splits,
            self.parts.evaluator,
            MetricCollection({}),
            _Last(),
            {},
            device=self.parts.device,
            epochs=1,
            log_every=2**62,
            clip_norm=self.clip_norm,
            check_finite=False,
            recover=self.config.accum.recovers,
        )
        trainer.total_updates = 2**62
        return trainer

    def _share(self, batch: WholeBatch, steps: int) -> Batch:
        total = batch_size(batch)
        steps = steps_for(total, self.full, steps)
        parts = rank_share(total, steps, self.rank_info.rank, self.rank_info.size)
        own = torch.cat([torch.arange(part.start, part.stop) for part in parts]).to(self.parts.device)
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
