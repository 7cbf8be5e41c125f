"""Batches that DataLoader workers read while the device computes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..accum.batch import Nested, tensors
from ..environment.random_state import derive_seed, drawn_from
from .batches import Batch, Batches


class StreamedBatches(Batches):
    """Batches read ahead by DataLoader workers and copied to the device.

    Args:
        dataset: map-style; a sample is a pair (inputs, targets).
        transform: applied to a sample's inputs.
        sample_augment: applied to a sample's inputs before `transform`. Its random draws, and those of the
            data set itself, are a function of the run's seed, the epoch and the sample's index.
        place: moves a batch's inputs and targets to the device and dtype of training.
        workers, prefetch, pin_memory: as in `torch.utils.data.DataLoader`.
        options: those of `Batches`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        indices: Tensor,
        batch_size: int,
        *,
        transform: Callable[[Any], Any] | None,
        sample_augment: Callable[[Any], Any] | None,
        place: Callable[[Nested, Nested], tuple[Nested, Nested]],
        workers: int,
        prefetch: int,
        pin_memory: bool,
        **options: Any,
    ) -> None:
        super().__init__(indices, batch_size, **options)
        self.place = place
        self._sampler = _EpochSampler(self)
        with warnings.catch_warnings():
            # training.preflight warns in one line that names the key.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            self._loader = DataLoader(
                _Samples(dataset, transform, sample_augment, self.shuffle or 0),
                batch_sampler=self._sampler,
                num_workers=workers,
                prefetch_factor=prefetch if workers else None,
                persistent_workers=workers > 0,
                pin_memory=pin_memory,
                worker_init_fn=_leave_group,
                # By default, starting an iterator draws from torch's global generator, which is the run's.
                generator=torch.Generator(),
            )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self._sampler.epoch, self._sampler.start = epoch, start
        loaded = zip(self._loader, self.batch_indices(epoch, start), strict=True)
        for (inputs, targets, indices), batch in loaded:
            inputs, targets = self.place(inputs, targets)
            if self.augment is not None:
                indices = indices.to(tensors(inputs)[0].device)
            inputs = self._augmented(inputs, indices, epoch)
            yield Batch(inputs, targets, indices, batch.samples, batch.total, batch.steps)


def _leave_group(worker: int) -> None:
    """Leaves the process group, so that stop signals reach the run only, which stops its workers."""
    if hasattr(os, "setsid"):
        os.setsid()


@dataclass
class _EpochSampler:
    """The batches of one epoch as lists of (epoch, index): workers need the epoch for their draws."""

    batches: Batches
    epoch: int = 0
    start: int = 0

    def __len__(self) -> int:
        return len(self.batches) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches.batch_indices(self.epoch, self.start):
            yield [(self.epoch, index) for index in batch.indices.tolist()]


@dataclass
class _Samples(Dataset[Any]):
    """Augmented and transformed samples, by (epoch, index)."""

    dataset: Dataset[Any]
    transform: Callable[[Any], Any] | None
    augment: Callable[[Any], Any] | None
    seed: int

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any, int]:
        epoch, index = key
        with drawn_from(derive_seed("sample", self.seed, epoch, index)):
            inputs, targets = self.dataset[index]
            if self.augment is not None:
                inputs = self.augment(inputs)
            if self.transform is not None:
                inputs = self.transform(inputs)
        return inputs, targets, index
