"""The order of a user's sampler, as a function of seed and epoch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, Subset

from ..config.instantiate import build
from ..environment.random_state import derive_seed, drawn_from
from ..errors import UsageError

# An epoch of a sampler may have this many positions, and a hundred times the split's samples.
MOST_POSITIONS = 10_000_000


class SamplerOrder:
    """Positions in the training split, drawn by `data.sampler` for each epoch.

    Every epoch starts from a copy of the sampler as it was built, with its torch generator and the global
    ones seeded by seed and epoch, and `set_epoch` called where there is one: so its order can be drawn again
    on resume.

    Args:
        node: of the sampler's class, which is offered `data_source` and `dataset` (the training split),
            `num_samples` (its length) and `generator` where it has such parameters.

    Raises:
        UsageError: if it cannot be built, or divides the samples among ranks itself.
    """

    def __init__(self, node: Mapping[str, Any], dataset: Dataset[Any], indices: Tensor) -> None:
        split = Subset(dataset, indices.tolist())
        # Not copied for an epoch; a generator of the sampler's own is.
        self._shared = (dataset, split)
        self.split_samples = len(indices)
        self.generator = torch.Generator().manual_seed(0)
        self.sampler = build(
            node,
            "data.sampler",
            data_source=split,
            dataset=split,
            num_samples=len(indices),
            generator=self.generator,
        )
        if isinstance(self.sampler, DistributedSampler):
            raise UsageError(
                "data.sampler: a DistributedSampler yields one rank's samples, and accum=ddp divides each "
                "batch itself; leave it out"
            )
        if not hasattr(self.sampler, "__iter__"):
            name = type(self.sampler).__name__
            raise UsageError(f"data.sampler: {name} is not iterable, a torch.utils.data.Sampler is needed")
        self._length: int | None = None
        self._drawn: tuple[Any, Tensor] | None = None

    def samples(self, count: int) -> int:
        """Samples in an epoch of the first `count` of the split."""
        if self._length is None:
            self._length = len(self._whole(0, 0))
        return min(self._length, count) if count < self.split_samples else self._length

    def positions(self, count: int, seed: int, epoch: int) -> Tensor:
        """The epoch's positions, each below `count`, shape (samples,).

        Of a split that is cut to its first `count` samples, the sampler's positions modulo `count`.
        """
        whole = self._whole(seed, epoch)
        if count == self.split_samples:
            return whole
        return whole[: self.samples(count)] % count

    def _whole(self, seed: int, epoch: int) -> Tensor:
        if self._drawn is not None and self._drawn[0] == (seed, epoch):
            return self._drawn[1]
        drawn = self._draw(seed, epoch)
        if self._length is not None and len(drawn) != self._length:
            raise UsageError(
                f"data.sampler: yields {len(drawn)} positions in epoch {epoch}, {self._length} in another; "
                "the schedule needs as many in each"
            )
        self._drawn = (seed, epoch), drawn
        return drawn

    def _draw(self, seed: int, epoch: int) -> Tensor:
        start = derive_seed("sampler", seed, epoch)
        with drawn_from(start):
            sampler = copy.deepcopy(self.sampler, {id(part): part for part in self._shared})
            self.generator.manual_seed(start)
            if (generator := getattr(sampler, "generator", None)) is not None:
                generator.manual_seed(start)
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)
            most = max(100 * self.split_samples, MOST_POSITIONS)
            drawn = list(itertools.islice(sampler, most + 1))
        if len(drawn) > most:
            raise UsageError(
                f"data.sampler: yields more than {most} positions, an epoch needs an end; give it a "
                "number of samples"
            )
        if not drawn:
            raise UsageError("data.sampler: yields no position of the training split")
        try:
            positions = torch.tensor([int(position) for position in drawn])
        except (TypeError, ValueError):
            kind = type(drawn[0]).__name__
            raise UsageError(
                f"data.sampler: yields a {kind}, a position in the training split is needed: batches are "
                "made by data.batch_size"
            ) from None
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= self.split_samples:
            wrong = low if low < 0 else high
            raise UsageError(
                f"data.sampler: yields the position {wrong}, and the training split has {self.split_samples} "
                f"samples (after data.eval_fraction is held out): 0 to {self.split_samples - 1}"
            )
        return positions
