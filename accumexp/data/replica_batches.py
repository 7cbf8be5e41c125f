"""The batches of several replicas at once: one data set, and an order of samples for each replica."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import itemgetter

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
        vars(self).update(vars(shared), shuffle=seed)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        return self.planned(epoch, start)


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
        rows = zip(indices, seeds, strict=True)
        draws = torch.cat([keyed_uniforms(row, augment.uniforms, seed) for row, seed in rows])
        inputs = map_tensors(lambda t: augment(t.flatten(0, 1), draws).unflatten(0, indices.shape), inputs)
    parts = [
        replace(batch, inputs=map_tensors(itemgetter(r), inputs), targets=map_tensors(itemgetter(r), targets))
        for r, batch in enumerate(batches)
    ]
    return inputs, targets, parts
