"""Losses, metrics, samplers, callbacks and models that are wrong in one way each."""

from __future__ import annotations

import itertools
import random
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Sampler, TensorDataset
from torchmetrics import Metric

from accumexp.training.callbacks import Callback
from accumexp.training.trainer import Trainer


class EndlessSampler(Sampler[int]):
    def __init__(self) -> None: ...

    def __iter__(self) -> Iterator[int]:
        return itertools.repeat(0)


class FewSampler(Sampler[int]):
    def __init__(self) -> None: ...

    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class OwnSampler(Sampler[int]):
    """Draws from a generator of its own, which torch does not know."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples, self.draws = num_samples, random.Random(0)

    def __iter__(self) -> Iterator[int]:
        return iter([self.draws.randrange(self.num_samples) for _ in range(self.num_samples)])


class OwnStream(IterableDataset[Any]):
    """64 samples drawn from a generator of its own."""

    def __init__(self) -> None:
        self.draws = random.Random(0)

    def __len__(self) -> int:
        return 64

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for _ in range(64):
            label = self.draws.randrange(3)
            yield torch.tensor([float(label), self.draws.random(), 1.0, 0.0]), label


class Nothing(TensorDataset):
    """Samples whose labels are all ignored."""

    def __init__(self, **_: Any) -> None:
        super().__init__(torch.rand(20, 1, 32, 32), torch.full((20,), -100))


class Holds(Callback):
    """Has `value` in its state."""

    def __init__(self, kind: str) -> None:
        self.value: Any = {"path": Path("/"), "function": len}[kind]

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.value}


class Slow(Callback):
    """Sleeps in every update as long as a file of this name is there."""

    def __init__(self, mark: str) -> None:
        self.mark = Path(mark)

    def update_end(self, trainer: Trainer) -> None:
        if self.mark.exists():
            time.sleep(0.5)


class Limit(Callback):
    """After update `at`, no file may grow beyond `size` bytes."""

    def __init__(self, at: int, size: int) -> None:
        self.at, self.size = at, size

    def update_end(self, trainer: Trainer) -> None:
        if trainer.progress.update == self.at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


class Logs(Callback):
    """Adds what no tracker takes to the measured values."""

    def __init__(self, kind: str) -> None:
        values: dict[str, dict[Any, Any]] = {"huge": {"mine": 10**400}, "number": {3: 1.0}}
        self.values = values[kind]

    def measured(self, trainer: Trainer, values: dict[str, float]) -> None:
        values.update(self.values)


class Matrix(Metric):
    """The last target of each pair of classes: no number and no vector."""

    def update(self, outputs: Tensor, targets: Tensor) -> None: ...

    def compute(self) -> Tensor:
        return torch.zeros(2, 2)


class PerSample(nn.Module):
    """A loss that forgets to add its samples up."""

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def weight(self, targets: Tensor) -> Tensor | float:
        return float(len(targets))
