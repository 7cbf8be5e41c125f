"""The batches of an epoch: one for each update, in an order that is a function of seed and epoch.

The order does not depend on how a batch is split afterwards, and any epoch can be entered at any
update, which is what lets a resumed run see exactly the samples that an undisturbed one would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..accum.batch import Nested, map_tensors, rank_share, steps_for, tensors
from ..environment.random_state import derive_seed
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
    """

    inputs: Nested
    targets: Nested
    indices: Tensor
    samples: int
    total: int
    steps: int


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

    def choose(self, indices: Tensor) -> None:
        """Takes only `indices`, all of which are of this split."""
        self.indices = indices

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
            yield Batch(inputs, targets, indices, chosen.samples, chosen.total, chosen.steps)
