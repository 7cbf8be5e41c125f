"""The batches of an epoch, one per update, in an order that depends on seed and epoch alone.

An epoch can start at any update, so a resumed run gets the samples of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..accum.batch import Nested, map_tensors, rank_share, steps_for, tensors
from ..environment.random_state import derive_seed
from .labels import TargetCheck
from .transforms import BatchAugment, keyed_uniforms
from .user_sampler import SamplerOrder


@dataclass(frozen=True)
class Share:
    """The part of every batch that this process reads: that of `rank`, in `steps` micro-batches."""

    rank: int = 0
    ranks: int = 1
    steps: int = 1


@dataclass(frozen=True)
class Batch:
    """This rank's samples of one update on the training device, and their indices (n,) in the data set.

    Attributes:
        samples: the number of them; 0 if the rank has none, and its one sample is padding.
        total: samples of the update on all ranks.
        steps: micro-batches of the update's window.
    """

    inputs: Nested
    targets: Nested
    indices: Tensor
    samples: int
    total: int
    steps: int


@dataclass(eq=False, repr=False)
class Batches:
    """Base class: the order of the samples. `len` is the number of updates in an epoch.

    Args:
        indices: the split's samples, as indices into the data set, shape (samples,), on the CPU.
        batch_size: samples in one update; the last batch of an epoch may be smaller.
        shuffle: the run's seed, for a new order each epoch, or None to keep the order of `indices`.
        drop_last: leave out the last, smaller batch.
        augment: applied to the inputs on the device, with draws keyed by seed, epoch and sample.
        share: the part of every batch that this rank reads.
        sampler: the order of an epoch in place of a shuffle; needs `shuffle` for its seed.

    Attributes:
        example: inputs and targets of a few samples, as the model and the loss get them, where known.
    """

    indices: Tensor
    batch_size: int
    _: KW_ONLY
    shuffle: int | None = None
    drop_last: bool = False
    augment: BatchAugment | None = None
    share: Share = Share()
    sampler: SamplerOrder | None = None
    example: tuple[Nested, Nested] | None = field(default=None, init=False)

    def __len__(self) -> int:
        full, rest = divmod(self.samples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def samples(self) -> int:
        return len(self.indices) if self.sampler is None else self.sampler.samples(len(self.indices))

    def choose(self, indices: Tensor) -> None:
        """Restricts the split to `indices`, for trials in which their order is no matter."""
        self.indices = indices
        self.sampler = None

    @property
    def last(self) -> int:
        """The samples in an epoch's last batch if it is smaller than the others, else 0."""
        return 0 if self.drop_last else self.samples % self.batch_size

    def order(self, epoch: int) -> Tensor:
        """The indices in the order of `epoch`, without the dropped ones, shape (samples,)."""
        order = self.indices
        if self.sampler is not None and self.shuffle is not None:
            order = order[self.sampler.positions(len(order), self.shuffle, epoch)]
        elif self.shuffle is not None:
            generator = torch.Generator().manual_seed(derive_seed("order", self.shuffle, epoch))
            order = order[torch.randperm(self.samples, generator=generator)]
        return order[: len(self) * self.batch_size]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of `epoch`, from update `start` on."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the processes that read; an epoch after it starts new ones."""

    def check_targets(self, check: TargetCheck) -> None:
        """Applies `check` to the targets, at once where they are on the device, else as they are read."""
        raise NotImplementedError

    def planned(self, epoch: int, start: int) -> Iterator[Batch]:
        """This rank's batches of `epoch`, from update `start` on, without inputs and targets."""
        for batch in self.order(epoch).split(self.batch_size)[start:]:
            total = len(batch)
            steps = steps_for(total, self.batch_size, self.share.steps)
            local = batch
            if self.share.ranks > 1:
                parts = rank_share(total, steps, self.share.rank, self.share.ranks)
                local = torch.cat([batch[part.start : part.stop] for part in parts])
            samples = len(local)
            yield Batch((), (), local if samples else batch[:1], samples, total, steps)

    def _augmented(self, inputs: Nested, indices: Tensor, epoch: int) -> Nested:
        if self.augment is None:
            return inputs
        augment, seed = self.augment, derive_seed("augment", self.shuffle or 0, epoch)
        draws = keyed_uniforms(indices, augment.uniforms, seed)
        return map_tensors(lambda images: augment(images, draws), inputs)


class ResidentBatches(Batches):
    """Batches gathered on the training device, which holds the whole data set.

    Args:
        inputs, targets: of the whole data set, (samples, ...).
        indices, batch_size, options: those of `Batches`.

    Attributes:
        key: of the data set, for errors.
        weighted: whether the targets are pairs (targets, weights).
    """

    def __init__(
        self, inputs: Nested, targets: Nested, indices: Tensor, batch_size: int, **options: Any
    ) -> None:
        super().__init__(indices, batch_size, **options)
        self.inputs = inputs
        self.targets = targets
        self.key = "data"
        self.weighted = False

    def check_targets(self, check: TargetCheck) -> None:
        targets: Any = self.targets
        check(targets[0] if self.weighted else targets, self.key)

    def planned(self, epoch: int, start: int) -> Iterator[Batch]:
        """As `Batches.planned`, with the indices on the device: one copy per epoch."""
        batches = list(super().planned(epoch, start))
        indices = torch.cat([batch.indices for batch in batches]) if batches else self.indices[:0]
        indices = indices.to(tensors(self.targets)[0].device)
        for batch, part in zip(batches, indices.split([len(b.indices) for b in batches]), strict=True):
            yield replace(batch, indices=part)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in self.planned(epoch, start):
            gather = partial(torch.index_select, dim=0, index=batch.indices)
            inputs = self._augmented(map_tensors(gather, self.inputs), batch.indices, epoch)
            yield replace(batch, inputs=inputs, targets=map_tensors(gather, self.targets))


@dataclass(frozen=True)
class Splits:
    """The batches of training, of the evaluation at each epoch's end, and of the final test.

    Attributes:
        has_eval: whether there are samples for `eval`; if not, it is `test` and not evaluated.
    """

    train: Batches
    eval: Batches
    test: Batches
    has_eval: bool = True

    def close(self) -> None:
        """Ends the processes that read the samples."""
        for batches in (self.train, self.eval, self.test):
            batches.close()
