"""Batches that DataLoader workers read while the device computes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import proxy

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ..accum.batch import Nested, tensors
from ..environment.random_state import derive_seed, drawn_from
from ..errors import TrainingError, UsageError, first_line
from .batches import Batch, Batches
from .labels import TargetCheck
from .samples import Collate, from_worker


class StreamedBatches(Batches):
    """Batches read ahead by DataLoader workers and copied to the device.

    Args:
        dataset: map-style.
        collate: makes inputs and targets of a list of its samples.
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
        collate: Collate,
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
        self._checks = collate.checks
        # Without a cycle of references, so that the workers of batches that are not closed end with them.
        self._sampler = _EpochSampler(proxy(self))
        with warnings.catch_warnings():
            # A run warns in one line that names the key (training.preflight).
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            self._loader = DataLoader(
                _Samples(dataset, SampleTransform(collate, transform, sample_augment, self.shuffle or 0)),
                batch_sampler=self._sampler,
                collate_fn=_CollateIndexed(collate),
                num_workers=workers,
                prefetch_factor=prefetch if workers else None,
                persistent_workers=workers > 0,
                pin_memory=pin_memory,
                worker_init_fn=leave_group,
                # The default is torch's global generator, which is the run's.
                generator=torch.Generator(),
            )

    def close(self) -> None:
        # Otherwise a garbage collection ends them, at any time and in any process: later workers, which are
        # forks of this one, would wait for those they have inherited.
        workers, self._loader._iterator = self._loader._iterator, None
        if isinstance(workers, _MultiProcessingDataLoaderIter):
            workers._shutdown_workers()

    def check_targets(self, check: TargetCheck) -> None:
        self._checks.append(check)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self._sampler.epoch, self._sampler.start = epoch, start
        loaded = zip(loaded_by_workers(self._loader), self.planned(epoch, start), strict=True)
        for (inputs, targets, indices), batch in loaded:
            inputs, targets = self.place(inputs, targets)
            if self.augment is not None:
                indices = indices.to(tensors(inputs)[0].device)
            inputs = self._augmented(inputs, indices, epoch)
            yield replace(batch, inputs=inputs, targets=targets, indices=indices)


def leave_group(worker: int) -> None:
    """Leaves the process group, so that stop signals reach only the run, which stops its workers."""
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
        for batch in self.batches.planned(self.epoch, self.start):
            yield [(self.epoch, index) for index in batch.indices.tolist()]


@dataclass
class SampleTransform:
    """A sample with its inputs augmented and transformed; draws are a function of seed, epoch and index."""

    collate: Collate
    transform: Callable[[Any], Any] | None
    augment: Callable[[Any], Any] | None
    seed: int

    def __call__(self, read: Callable[[], Any], epoch: int, index: int) -> Any:
        """What `read` returns, transformed.

        Raises:
            UsageError: naming the sample that cannot be read.
        """
        with drawn_from(derive_seed("sample", self.seed, epoch, index)):
            return self.read(read, index)

    def read(self, read: Callable[[], Any], index: int) -> Any:
        """The same, with draws from the global generators."""
        key = self.collate.key
        try:
            sample = read()
            if self.augment is None and self.transform is None:
                return sample
            return self.collate.layout.with_inputs(sample, self._change, key)
        except UsageError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UsageError(f"{key}: sample {index} cannot be read: {reason}") from error

    def _change(self, inputs: Any) -> Any:
        for change in (self.augment, self.transform):
            inputs = inputs if change is None else change(inputs)
        return inputs


@dataclass
class _Samples(Dataset[Any]):
    """Transformed samples and their indices, by (epoch, index)."""

    dataset: Dataset[Any]
    transform: SampleTransform

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, int]:
        epoch, index = key
        return self.transform(lambda: self.dataset[index], epoch, index), index


@dataclass
class _CollateIndexed:
    collate: Collate

    def __call__(self, items: list[tuple[Any, int]]) -> tuple[Any, Any, Tensor]:
        samples, indices = zip(*items, strict=True)
        return *self.collate(list(samples), indices), torch.tensor(indices)


def loaded_by_workers(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of `loader`; errors of its workers in one line.

    Raises:
        UsageError: as the worker's own.
        TrainingError: if a worker was killed.
    """
    try:
        yield from loader
    except UsageError as error:
        raise from_worker(error) from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise TrainingError(
                f"data.workers={loader.num_workers}: {first_line(error)}; they may need more "
                "memory than there is: lower data.workers or data.prefetch"
            ) from error
        raise
