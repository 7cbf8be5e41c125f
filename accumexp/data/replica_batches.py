"""The batches of several replicas at once: one data set, and an order of samples for each replica."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ..accum.batch import Nested, map_tensors
from ..environment.random_state import derive_seed
from .batches import Batch, ResidentBatches
from .transforms import keyed_uniforms


class PlannedBatches(ResidentBatches):
    """One replica's order of samples. Its batches have no inputs and targets, which `gathered` adds.

    Args:
        shared: the batches of all replicas' data set.
        seed: the seed of the replica's order and augmentation.
    """

    def __init__(self, shared: ResidentBatches, seed: int) -> None:
        super().__init__(
            shared.inputs,
            shared.targets,
            shared.indices,
            shared.batch_size,
            shuffle=seed,
            drop_last=shared.drop_last,
            augment=shared.augment,
            share=shared.share,
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in self.batch_indices(epoch, start):
            yield Batch((), (), *batch)


def gathered(
    batches: Sequence[Batch], feeds: Sequence[ResidentBatches], epoch: int
) -> tuple[Nested, Nested, list[Batch]]:
    """Reads the batches of one update of R replicas, all at once.

    Args:
        batches: each replica's batch, without inputs and targets.
        feeds: the `PlannedBatches` that they are from.

    Returns:
        Inputs and targets, (R, n, ...), and each replica's batch with its part of them.
    """
    indices = torch.stack([batch.indices for batch in batches])
    inputs, targets = (map_tensors(lambda t: t[indices], t) for t in (feeds[0].inputs, feeds[0].targets))
    augment = feeds[0].augment
    if augment is not None:
        seeds = [derive_seed("augment", feed.shuffle or 0, epoch) for feed in feeds]
        uniforms = augment.uniforms
        draws = torch.cat(
            [keyed_uniforms(b.indices, uniforms, seed) for b, seed in zip(batches, seeds, strict=True)]
        )
        inputs = map_tensors(lambda t: augment(t.flatten(0, 1), draws).unflatten(0, indices.shape), inputs)
    return (
        inputs,
        targets,
        [
            replace(
                batch,
                inputs=map_tensors(lambda t, r=r: t[r], inputs),
                targets=map_tensors(lambda t, r=r: t[r], targets),
            )
            for r, batch in enumerate(batches)
        ],
    )
