"""Batches of a stream: an IterableDataset, read in its own order from its beginning in every epoch."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ..accum.batch import Nested, tensors
from ..environment.random_state import derive_seed, drawn_from, random_state, restore_random_state
from ..errors import UsageError
from .batches import Batch, Batches
from .labels import TargetCheck
from .samples import Collate
from .worker_batches import SampleTransform, leave_group, loaded_by_workers

log = logging.getLogger(__name__)
SLOW_COUNT = 10.0  # seconds


class StreamBatches(Batches):
    """Batches of the stream's samples at `indices`, positions in the stream, in its order.

    Every rank reads the whole stream and keeps its share. An epoch that starts in the middle, on resume,
    reads and leaves out the samples before. The stream's random draws are a function of the run's seed and
    the epoch.

    Args:
        length: samples of the stream.
        workers: 0 or 1; several would each read the whole stream.
        collate, transform, sample_augment, place, prefetch, pin_memory, options: as in `StreamedBatches`.
    """

    def __init__(
        self,
        dataset: IterableDataset[Any],
        indices: Tensor,
        batch_size: int,
        *,
        length: int,
        collate: Collate,
        transform: Callable[[Any], Any] | None,
        sample_augment: Callable[[Any], Any] | None,
        place: Callable[[Nested, Nested], tuple[Nested, Nested]],
        workers: int,
        prefetch: int,
        pin_memory: bool,
        **options: Any,
    ) -> None:
        seed = options.pop("shuffle", None)
        super().__init__(indices, batch_size, **options)
        self.place = place
        self.seed = seed or 0
        self._reader = _Reader(
            dataset,
            length,
            collate,
            SampleTransform(collate, transform, sample_augment, self.seed),
            self.seed,
        )
        self._options: dict[str, Any] = {
            "batch_size": None,
            "num_workers": min(workers, 1),
            "prefetch_factor": prefetch if workers else None,
            "pin_memory": pin_memory,
            "worker_init_fn": leave_group,
        }

    def check_targets(self, check: TargetCheck) -> None:
        self._reader.collate.checks.append(check)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        batches = list(self.planned(epoch, start))
        self._reader.epoch, self._reader.wanted = epoch, [batch.indices.tolist() for batch in batches]
        # A new loader, because a worker keeps the reader that it was started with.
        loader = DataLoader(self._reader, generator=torch.Generator(), **self._options)
        for (inputs, targets), batch in zip(loaded_by_workers(loader), batches, strict=True):
            inputs, targets = self.place(inputs, targets)
            indices = batch.indices
            if self.augment is not None:
                indices = indices.to(tensors(inputs)[0].device)
            inputs = self._augmented(inputs, indices, epoch)
            yield replace(batch, inputs=inputs, targets=targets, indices=indices)


class _Reader(IterableDataset[Any]):
    """The wanted batches, collated, as the stream comes by."""

    def __init__(
        self,
        dataset: IterableDataset[Any],
        length: int,
        collate: Collate,
        transform: SampleTransform,
        seed: int,
    ) -> None:
        self.dataset = dataset
        self.length = length
        self.collate = collate
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self.wanted: list[list[int]] = []

    def __iter__(self) -> Iterator[Any]:
        stream, position = self._start(), 0
        for wanted in self.wanted:
            if wanted and min(wanted) < position:  # the order repeats samples
                stream, position = self._start(), 0
            needed, samples = set(wanted), {}
            while position <= max(wanted):
                sample = next(stream, _END)
                if sample is _END:
                    raise UsageError(
                        f"{self.collate.key}: the stream ended after {position} samples, {self.length} were "
                        "declared or counted; give data.samples=<as many as it yields in each epoch>"
                    )
                if position in needed:
                    samples[position] = self.transform(lambda s=sample: s, self.epoch, position)
                position += 1
            yield self.collate([samples[k] for k in wanted], wanted)
        if position == self.length and next(stream, _END) is not _END:
            log.warning(
                "%s: the stream goes on after %d samples, which are left out", self.collate.key, position
            )

    def _start(self) -> Iterator[Any]:
        return _own_draws(self.dataset, derive_seed("stream", self.seed, self.epoch), self.collate.key)


def _own_draws(dataset: IterableDataset[Any], seed: int, key: str) -> Iterator[Any]:
    """The samples of `dataset`, whose draws come from generators of its own, seeded with `seed`."""
    with suppress(Exception):  # of what cannot be copied, such as an open file
        dataset = copy.deepcopy(dataset)  # a generator of its own begins anew, as it does in a worker
    with drawn_from(seed):
        stream = iter(dataset)
        stream_state = random_state(devices=False)
    while True:
        outside = random_state(devices=False)
        restore_random_state(stream_state)
        try:
            sample = next(stream, _END)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"{key}: the stream fails: {type(error).__name__}: {error}") from error
        finally:
            stream_state = random_state(devices=False)
            restore_random_state(outside)
        if sample is _END:
            return
        yield sample


def stream_length(dataset: IterableDataset[Any], key: str, declared: int | None = None) -> int:
    """Samples of a stream: declared, its `len()`, or counted by reading it once."""
    if declared is not None:
        return declared
    try:
        return len(cast(Any, dataset))
    except (TypeError, NotImplementedError):
        pass
    from rich.progress import track

    samples = _own_draws(dataset, derive_seed("stream", 0, 0), key)
    begun, count = time.monotonic(), 0
    for count, _ in enumerate(track(samples, f"counting {key}", transient=True), 1):
        if begun and time.monotonic() - begun > SLOW_COUNT:
            begun = 0.0
            remedy = "data.samples=<samples an epoch>" if key == "data.train" else "it a len() or an end"
            log.warning("%s: %d samples and no end yet; if there is none, give %s", key, count, remedy)
    return count


def first_samples(dataset: IterableDataset[Any], count: int, key: str) -> list[Any]:
    """The first `count` samples of a stream, or all of them."""
    samples = _own_draws(dataset, derive_seed("stream", 0, 0), key)
    return [sample for _, sample in zip(range(count), samples, strict=False)]


_END = object()
