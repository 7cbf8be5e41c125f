"""A run's samples for a trial of its loop: whole batches of any size, as many as a few updates need."""

from __future__ import annotations

from itertools import chain, islice

import torch
from torch import Tensor

from ..accum import Peak, measure_peak, tensors
from ..data import Batches, ResidentBatches, Share, Splits

# The optimizer's state and kept gradients are there from the second on.
UPDATES = 2


class TrialData:
    """The splits of a run, cut to what is tried; samples are repeated if there are too few.

    Args:
        rank, ranks: the rank whose part of every batch is tried.

    Attributes:
        batch_size, eval_batch_size: the run's, on all ranks.
        evaluated: samples of a rank in the largest evaluated batch.
    """

    def __init__(self, splits: Splits, rank: int, ranks: int, device: torch.device) -> None:
        self.splits = splits
        self.rank = rank
        self.ranks = ranks
        self.device = device
        self.batch_size = splits.train.batch_size
        self.eval_batch_size = splits.eval.batch_size
        self._whole = {id(batches): batches.indices for batches in self._every()}
        most = max(len(self._whole[id(batches)]) for batches in self._every()[1:])
        self.evaluated = -(-min(self.eval_batch_size, most) // ranks)
        # A second batch is gathered while the first is still there.
        self._evaluations = 2 if most > self.eval_batch_size else 1

    @property
    def samples(self) -> int:
        """Samples to train on."""
        return len(self._whole[id(self.splits.train)])

    @property
    def held(self) -> list[Tensor]:
        """The data and indices of samples that lie on the device."""
        held: list[Tensor] = []
        for batches in self._every():
            held.append(self._whole[id(batches)])
            if isinstance(batches, ResidentBatches):
                held += [*tensors(batches.inputs), *tensors(batches.targets)]
        return [tensor for tensor in held if tensor.device.type == self.device.type]

    def take_small(self, micro: int, steps: int) -> None:
        """Makes ready for windows of `steps` micro-batches of `micro`, and evaluations of as many."""
        batch = steps * micro
        self._cut(batch, Share(steps=steps), UPDATES * batch, micro)

    def take_whole(self, steps: int) -> None:
        """Makes ready for this rank's part of the run's own batch in `steps`, and its own evaluation.

        An epoch's last, smaller batch is left out, unless there is no other.
        """
        batch, samples = self.batch_size, self.samples
        every = samples if samples < batch else -(-samples // batch) * batch
        self._cut(batch, Share(self.rank, self.ranks, steps), every, self.evaluated)

    def gather(self, before: int) -> Peak:
        """The peak of gathering one batch after the other."""
        train = self.splits.train
        with measure_peak(self.device, before) as peak:
            batches = chain.from_iterable(train.epoch(number) for number in range(UPDATES))
            for _batch in islice(batches, UPDATES):
                pass
        return peak

    def _every(self) -> list[Batches]:
        return [self.splits.train, self.splits.eval, self.splits.test]

    def _cut(self, batch: int, share: Share, samples: int, evaluated: int) -> None:
        train, rest = self.splits.train, self.splits.eval
        train.batch_size, train.share = batch, share
        train.choose(_repeated(self._whole[id(train)], samples))
        rest.batch_size, rest.share = evaluated, Share()
        rest.choose(_repeated(self._whole[id(rest)], self._evaluations * evaluated))


def _repeated(indices: Tensor, samples: int) -> Tensor:
    """The first `samples` of `indices`, repeated if there are fewer."""
    return indices[torch.arange(samples) % len(indices)]
