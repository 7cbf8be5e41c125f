"""The batches of many replicas at once: an order each, one data set for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..accum.batch import Nested, map_tensors
from ..environment.random_state import derive_seed
from .batches import Batch, ResidentBatches
from .transforms import keyed_uniforms


class PlannedBatches(ResidentBatches):
    """One replica's order of samples: its batches come without their data, which `gathered` adds.

    Args:
        shared: what all replicas draw their batches from.
        seed: of the replica's order and augmentation.
    """

    def __init__(self, shared: ResidentBatches, seed: int) -> None:
        own = {
            "shuffle": seed,
            "drop_last": shared.drop_last,
            "augment": shared.augment,
            "share": shared.share,
        }
        super().__init__(shared.inputs, shared.targets, shared.indices, shared.batch_size, **own)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for chosen, indices in self.placed(epoch, start):
            yield Batch((), (), indices, chosen.samples, chosen.total, chosen.steps)


def gathered(
    batches: Sequence[Batch], feeds: Sequence[ResidentBatches], epoch: int
) -> tuple[Nested, Nested, list[Batch]]:
    """The planned batches of one update of R replicas, all at once.

    Returns:
        Inputs and targets, (R, n, ...), and each replica's batch of them.
    """
    indices = torch.stack([batch.indices for batch in batches])

    def gather(tensor: Tensor) -> Tensor:
        return tensor[indices]

    inputs, targets = (map_tensors(gather, whole) for whole in (feeds[0].inputs, feeds[0].targets))
    augment = feeds[0].augment
    if augment is not None:
        seeds = [derive_seed("augment", feed.shuffle or 0, epoch) for feed in feeds]
        uniforms = augment.uniforms
        draws = torch.cat(
            [keyed_uniforms(b.indices, uniforms, seed) for b, seed in zip(batches, seeds, strict=True)]
        )
        inputs = map_tensors(lambda t: augment(t.flatten(0, 1), draws).unflatten(0, indices.shape), inputs)
    each = [
        replace(
            batch,
            inputs=map_tensors(lambda t, r=r: t[r], inputs),
            targets=map_tensors(lambda t, r=r: t[r], targets),
        )
        for r, batch in enumerate(batches)
    ]
    return inputs, targets, each
