"""The batches of an epoch: one for each update, in an order that is a function of seed and epoch.

The order does not depend on how a batch is split afterwards, and any epoch can be entered at any
update, which is what lets a resumed run see exactly the samples that an undisturbed one would.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..accum.batch import Nested, map_tensors, rank_share, steps_for, tensors
from ..seeding import derive_seed, drawn_from
from .transforms import BatchAugment, keyed_uniforms


@dataclass(frozen=True)
class Share:
    """Which samples of which ranks: this process is `rank` of `ranks`, each of `steps` micro-batches."""

    rank: int = 0
    ranks: int = 1
    steps: int = 1


@dataclass(frozen=True)
class Batch:
    """This rank's samples of one update on the training device, and their indices (n,) in the data set.

    Attributes:
        samples: how many of them count; 0 where the rank has none, and the one it holds is padding.
        total: samples of the update on all ranks.
        steps: micro-batches of the update's window.
        weight: of the update's samples in the loss, where one process knows it without a look at them.
            `known_weight` is what to use.
    """

    inputs: Nested
    targets: Nested
    indices: Tensor
    samples: int
    total: int
    steps: int
    weight: float | None = None

    @property
    def known_weight(self) -> float | None:
        """`weight`, as long as nobody has written to the targets."""
        return self.weight if getattr(self.targets, "_version", None) == 0 else None


class _Chosen(NamedTuple):
    indices: Tensor
    samples: int
    total: int
    steps: int


class Batches:
    """Base of both feeds: who comes when. `len` is the number of updates in an epoch.

    Args:
        indices: the samples, as indices into the data set, shape (samples,), on the CPU.
        batch_size: samples in one update; the last batch of an epoch may be smaller.
        shuffle: the run's seed for a new order each epoch, or None to keep the order of `indices`.
        drop_last: leave out the last, smaller batch.
        augment: applied to the inputs on the device, keyed by seed, epoch and sample.
        share: the part of every batch that this rank takes; the others never read it.
    """

    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        *,
        shuffle: int | None = None,
        drop_last: bool = False,
        augment: BatchAugment | None = None,
        share: Share | None = None,
    ) -> None:
        self.indices = indices
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.augment = augment
        self.share = share or Share()

    def __len__(self) -> int:
        full, rest = divmod(self.samples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def samples(self) -> int:
        return len(self.indices)

    @property
    def last(self) -> int:
        """Samples in an epoch's last batch where it is smaller than the others, else 0."""
        return 0 if self.drop_last else self.samples % self.batch_size

    def order(self, epoch: int) -> Tensor:
        """The indices in the order of `epoch`, shape (samples,), without what is dropped."""
        if self.shuffle is None:
            order = self.indices
        else:
            generator = torch.Generator().manual_seed(derive_seed("order", self.shuffle, epoch))
            order = self.indices[torch.randperm(self.samples, generator=generator)]
        return order[: len(self) * self.batch_size]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from its update number `start` on."""
        raise NotImplementedError

    def chosen(self, epoch: int, start: int) -> Iterator[_Chosen]:
        """This rank's samples in the batches of `epoch` from `start` on."""
        for batch in self.order(epoch).split(self.batch_size)[start:]:
            total = len(batch)
            steps = steps_for(total, self.batch_size, self.share.steps)
            own, samples = batch, total
            if self.share.ranks > 1:
                parts = rank_share(total, steps, self.share.rank, self.share.ranks)
                own = torch.cat([batch[part.start : part.stop] for part in parts])
                samples = len(own)
            yield _Chosen(own if samples else batch[:1], samples, total, steps)

    def _augmented(self, inputs: Nested, indices: Tensor, epoch: int) -> Nested:
        if self.augment is None:
            return inputs
        seed = derive_seed("augment", self.shuffle or 0, epoch)
        draws = keyed_uniforms(indices, self.augment.uniforms, seed)
        augment = self.augment
        return map_tensors(lambda images: augment(images, draws), inputs)


class ResidentBatches(Batches):
    """All samples on the training device: an update's batch is gathered there, nothing is copied to it.

    `inputs` and `targets` hold the whole data set; `indices` says which of it belong to this split.
    """

    def __init__(
        self, inputs: Nested, targets: Nested, indices: Tensor, batch_size: int, **options: Any
    ) -> None:
        super().__init__(indices, batch_size, **options)
        self.inputs = inputs
        self.targets = targets
        self._weighed: tuple[Nested, int, float] | None = None

    @property
    def sample_weight(self) -> float | None:
        """What each sample weighs in the loss, where all weigh the same and `weigh` was told so.

        None again as soon as somebody writes to the targets or takes others.
        """
        if self._weighed is None:
            return None
        targets, version, weight = self._weighed
        same = targets is self.targets and getattr(targets, "_version", None) == version
        return weight if same else None

    def weigh(self, weight: float | None) -> None:
        """Says what each sample weighs in the loss; None if they differ or nobody knows."""
        version = getattr(self.targets, "_version", None)
        self._weighed = None if weight is None or version is None else (self.targets, version, weight)

    def placed(self, epoch: int, start: int) -> Iterator[tuple[_Chosen, Tensor]]:
        """The samples of the batches of `epoch` from `start` on, with their indices on the device."""
        plan = list(self.chosen(epoch, start))
        # One copy to the device an epoch, not one an update.
        every = torch.cat([chosen.indices for chosen in plan]) if plan else self.indices[:0]
        placed = every.to(tensors(self.targets)[0].device).split([len(chosen.indices) for chosen in plan])
        return zip(plan, placed, strict=True)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for chosen, indices in self.placed(epoch, start):

            def gather(tensor: Tensor, indices: Tensor = indices) -> Tensor:
                return tensor.index_select(0, indices)

            inputs = self._augmented(map_tensors(gather, self.inputs), indices, epoch)
            targets = map_tensors(gather, self.targets)
            total, each = chosen.total, self.sample_weight
            # On several ranks one may write to its targets and another not, so all of them count.
            weight = None if each is None or self.share.ranks > 1 else total * each
            yield Batch(inputs, targets, indices, chosen.samples, total, chosen.steps, weight)


class StreamedBatches(Batches):
    """Samples read by DataLoader workers ahead of their use, through pinned memory to the device.

    Args:
        dataset: map-style; a sample is a pair (inputs, targets).
        transform: applied to a sample's inputs.
        sample_augment: then applied in training; it, and anything random in the data set itself, draws
            from the run's seed, the epoch and the sample's index.
        place: moves a batch's inputs and targets to the device and dtype of training.
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
        self._loader = DataLoader(
            _Samples(dataset, transform, sample_augment, self.shuffle or 0),
            batch_sampler=self._sampler,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_leave_group,
            # A generator of its own, or starting an iterator would draw from the run's.
            generator=torch.Generator(),
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self._sampler.epoch, self._sampler.start = epoch, start
        for (inputs, targets, indices), chosen in zip(self._loader, self.chosen(epoch, start), strict=True):
            inputs, targets = self.place(inputs, targets)
            if self.augment is not None:
                indices = indices.to(tensors(inputs)[0].device)
            inputs = self._augmented(inputs, indices, epoch)
            yield Batch(inputs, targets, indices, chosen.samples, chosen.total, chosen.steps)


def _leave_group(worker: int) -> None:
    """Out of the process group that a stop signal is sent to: it is for the run to stop its workers."""
    if hasattr(os, "setsid"):
        os.setsid()


class _EpochSampler:
    """The batches of one epoch as lists of (epoch, index): workers learn the epoch with each sample."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return len(self.batches) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for chosen in self.batches.chosen(self.epoch, self.start):
            yield [(self.epoch, index) for index in chosen.indices.tolist()]


class _Samples(Dataset[Any]):
    def __init__(
        self,
        dataset: Dataset[Any],
        transform: Callable[[Any], Any] | None,
        augment: Callable[[Any], Any] | None,
        seed: int,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.augment = augment
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Any, int]:
        epoch, index = key
        with drawn_from(derive_seed("sample", self.seed, epoch, index)):
            inputs, targets = self.dataset[index]
            if self.augment is not None:
                inputs = self.augment(inputs)
            if self.transform is not None:
                inputs = self.transform(inputs)
        return inputs, targets, index
