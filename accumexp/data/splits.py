"""Builds the train, eval and test splits from the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ..accum import is_out_of_memory
from ..accum.batch import Nested, map_tensors, tensors
from ..config.instantiate import build, lacks_argument
from ..config.schema import DataConfig
from ..environment.cores import most_workers
from ..environment.memory import free_bytes
from ..environment.random_state import drawn_from
from ..errors import UsageError, first_line
from .batches import Batches, ResidentBatches, Share, Splits
from .iterable_batches import StreamBatches, first_samples, stream_length
from .labels import LabelCheck
from .raw import concatenated, raw_tensors
from .samples import Collate, Layout
from .transforms import BatchAugment
from .user_sampler import SamplerOrder
from .worker_batches import SampleTransform, StreamedBatches

RESIDENT_SHARE = 0.25
TRANSFORM_CHUNK = 4096
# Samples that are read and collated before training, so that what cannot be is known by then.
EXAMPLES = 4


@dataclass(frozen=True)
class Placement:
    """Moves batches to the training device and casts floats.

    Inputs become `dtype`, that of the model's parameters, and targets fp32 or wider.
    """

    device: torch.device
    dtype: torch.dtype

    def __call__(self, inputs: Nested, targets: Nested) -> tuple[Nested, Nested]:
        wide = torch.promote_types(self.dtype, torch.float32)

        def place(batch: Nested, dtype: torch.dtype) -> Nested:
            return map_tensors(
                lambda t: t.to(self.device, dtype if t.is_floating_point() else t.dtype, non_blocking=True),
                batch,
            )

        return place(inputs, self.dtype), place(targets, wide)


def build_splits(
    config: DataConfig,
    seed: int,
    place: Placement,
    share: Share | None = None,
    ignored: int | None = None,
) -> Splits:
    """Builds the splits, resident on the device or streamed to it.

    Args:
        seed: the seed of the training order and augmentation.
        place: moves batches to the device.
        share: the part of every batch that this process reads; None for all of it.
        ignored: the label that the loss ignores; None for a loss that is not of class labels.

    Raises:
        UsageError: if a data set is missing, cannot be downloaded, or has too few samples to train on.
    """
    batch_size = cast(int, config.batch_size)
    train_set = _dataset(config, config.train, "data.train")
    test_set = _dataset(config, config.test, "data.test")
    train_indices = torch.arange(_length(train_set, "data.train", config.samples))
    if config.eval:
        eval_set = _dataset(config, config.eval, "data.eval")
        eval_indices = torch.arange(_length(eval_set, "data.eval"))
    else:
        eval_set = train_set
        held_out = max(1, round(len(train_indices) * config.eval_fraction)) if config.eval_fraction else 0
        generator = torch.Generator().manual_seed(config.split_seed)
        order = torch.randperm(len(train_indices), generator=generator)
        eval_indices, train_indices = order[:held_out].sort().values, order[held_out:].sort().values
    if not len(train_indices) or config.drop_last and len(train_indices) < batch_size:
        raise UsageError(f"data.batch_size={batch_size}: only {len(train_indices)} samples to train on")
    test_indices = torch.arange(_length(test_set, "data.test"))
    for key, indices, given in (("data.eval", eval_indices, config.eval), ("data.test", test_indices, True)):
        if given and not len(indices):
            raise UsageError(f"{key}: has no samples, and a score of none is no score; give it some")
    has_eval = len(eval_indices) > 0
    if not has_eval:
        eval_set, eval_indices = test_set, test_indices

    transform = build(config.transform, "data.transform") if config.transform else None
    augment = build(config.augment, "data.augment") if config.augment else None
    sampler = None
    if config.sampler:
        if isinstance(train_set, IterableDataset):
            raise UsageError("data.sampler: a stream is read in its own order, leave it out")
        sampler = SamplerOrder(config.sampler, train_set, train_indices)
    inputs = None if config.inputs is None else tuple(config.inputs)
    batches = _BatchesFactory(
        config,
        transform,
        place,
        Layout(config.target, config.weight, inputs),
        LabelCheck(config.num_classes, ignored),
        _build_collate(config) if config.collate else None,
    )
    share = share or Share()
    whole = replace(share, steps=1)
    training: dict[str, Any] = {
        "shuffle": seed,
        "drop_last": config.drop_last,
        "share": share,
        "sampler": sampler,
    }
    eval_key = "data.eval" if config.eval else "data.train"
    train = batches(train_set, train_indices, batch_size, augment, key="data.train", **training)
    if not len(train):
        raise UsageError(
            f"data.batch_size={batch_size}: with data.drop_last=true the {train.samples} samples of an "
            "epoch of data.sampler make no update"
        )
    return Splits(
        train=train,
        eval=batches(eval_set, eval_indices, config.eval_batch_size, key=eval_key, share=whole),
        test=batches(test_set, test_indices, config.eval_batch_size, key="data.test", share=whole),
        has_eval=has_eval,
    )


@dataclass
class _BatchesFactory:
    """Makes the batches of each split, resident or streamed; reads every resident data set once."""

    config: DataConfig
    transform: Callable[[Any], Any] | None
    place: Placement
    layout: Layout
    labels: LabelCheck
    collate: Callable[[list[Any]], Any] | None
    _read: dict[int, tuple[Nested, Nested]] = field(default_factory=dict)

    def __call__(
        self,
        dataset: Dataset[Any],
        indices: Tensor,
        batch_size: int,
        augment: Any = None,
        *,
        key: str,
        **options: Any,
    ) -> Batches:
        on_device = augment if isinstance(augment, BatchAugment) else None
        by_sample: Any = None if on_device else augment
        if by_sample is None and self._resident(dataset):
            inputs, targets = self._tensors(dataset, key)
            resident = ResidentBatches(inputs, targets, indices, batch_size, augment=on_device, **options)
            resident.key, resident.weighted = key, self.layout.weight is not None
            few = indices[:EXAMPLES].to(tensors(inputs)[0].device)
            resident.example = (
                map_tensors(lambda tensor: tensor[few], inputs),
                map_tensors(lambda tensor: tensor[few], targets),
            )
            return resident
        if by_sample is not None and self.config.resident:
            raise UsageError(
                "data.resident=true: data.augment works sample by sample, so it needs "
                "data.resident=false, or a BatchAugment such as accumexp.data.ShiftAndFlip"
            )
        collate = Collate(key, self.layout, self.collate, [self.labels])
        arguments: dict[str, Any] = {
            "collate": collate,
            "transform": self.transform,
            "sample_augment": by_sample,
            "place": self.place,
            "workers": min(self.config.workers, most_workers()),
            "prefetch": self.config.prefetch,
            "pin_memory": self.place.device.type == "cuda",
            "augment": on_device,
            **options,
        }
        change = SampleTransform(collate, self.transform, by_sample, options.get("shuffle") or 0)
        if isinstance(dataset, IterableDataset):
            arguments.pop("sampler", None)
            length = _length(dataset, key, self.config.samples if key == "data.train" else None)
            batches: Batches = StreamBatches(dataset, indices, batch_size, length=length, **arguments)
            first = first_samples(dataset, EXAMPLES, key)
            few = [change(lambda s=s: s, 0, k) for k, s in enumerate(first)]
            numbers = list(range(len(few)))
        else:
            batches = StreamedBatches(dataset, indices, batch_size, **arguments)
            numbers = indices[:EXAMPLES].tolist()
            few = [change(lambda i=i: dataset[i], 0, i) for i in numbers]
        # Before the first update, and in this process, where errors are the plainest.
        batches.example = self.place(*collate(few, numbers)) if few else None
        return batches

    def _resident(self, dataset: Dataset[Any]) -> bool:
        if self.config.resident:
            if isinstance(dataset, IterableDataset):
                raise UsageError("data.resident=true: a stream is read as it comes, leave it out")
            if self.collate is not None:
                raise UsageError(
                    "data.resident=true: data.collate makes one batch at a time, so it needs "
                    "data.resident=false"
                )
        if self.config.resident is not None:
            return self.config.resident
        raw = None if self.collate is not None else raw_tensors(dataset, self.layout)
        if raw is None:
            return False
        inputs, targets = map_tensors(lambda tensor: tensor[:1], raw)
        sample = self.place(self._transformed(inputs), targets)
        bytes_each = sum(tensor.nbytes for tensor in tensors(sample))
        return bytes_each * _length(dataset, "data") <= RESIDENT_SHARE * free_bytes(self.place.device)

    def _tensors(self, dataset: Dataset[Any], data_key: str) -> tuple[Nested, Nested]:
        """The whole data set, transformed and on the device."""
        key = id(dataset)
        if key not in self._read:
            raw = raw_tensors(dataset, self.layout)
            if raw is None:
                inputs, targets = self._read_samples(dataset, data_key)
            else:
                inputs, targets = self._transformed(raw[0]), raw[1]
                self.labels(cast(Any, targets)[0] if self.layout.weight is not None else targets, data_key)
            self._read[key] = self.place(inputs, targets)
        return self._read[key]

    def _transformed(self, inputs: Nested) -> Nested:
        transform = self.transform
        if transform is None:
            return inputs

        def in_chunks(tensor: Tensor) -> Tensor:
            chunks = tensor.split(TRANSFORM_CHUNK)
            return torch.cat([transform(chunk).as_subclass(Tensor) for chunk in chunks])

        return map_tensors(in_chunks, inputs)

    def _read_samples(self, dataset: Dataset[Any], key: str) -> tuple[Nested, Nested]:
        from rich.progress import track

        collate = Collate(key, self.layout, checks=[self.labels])
        change = SampleTransform(collate, self.transform, None, 0)
        chunks: list[tuple[Any, Any]] = []
        with drawn_from(0):
            every = torch.arange(_length(dataset, key)).split(256)
            for indices in track(every, "reading data", transient=True):
                numbers = indices.tolist()
                chunks.append(collate([change.read(lambda i=i: dataset[i], i) for i in numbers], numbers))
        try:
            return concatenated([c[0] for c in chunks]), concatenated([c[1] for c in chunks])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = f"the samples cannot be stacked: {first_line(error)}"
            raise UsageError(f"{key}: {reason}; give data.resident=false and a data.collate") from error


def _dataset(config: DataConfig, node: Mapping[str, Any], key: str) -> Dataset[Any]:
    try:
        return build(node, key)
    except UsageError as error:
        cause = error.__cause__
        if isinstance(cause, OSError | RuntimeError) and not is_out_of_memory(cause):
            raise UsageError(
                f"data.root={config.root}: {error}; give the folder that holds the data, or a "
                "connection to download it"
            ) from cause
        raise


def _build_collate(config: DataConfig) -> Callable[[list[Any]], Any]:
    """The collate of `data.collate`: what the node makes, or the target itself where it lacks an argument."""
    node = cast(Mapping[str, Any], config.collate)
    if lacks_argument(node):
        node = {**node, "_partial_": True}
    collate = build(node, "data.collate", target=config.target, weight=config.weight)
    if not callable(collate):
        made = type(collate).__name__
        raise UsageError(
            f"data.collate: {node['_target_']} made a {made}, a function of a list of samples is needed"
        )
    return collate


def _length(dataset: Dataset[Any], key: str, declared: int | None = None) -> int:
    if isinstance(dataset, IterableDataset):
        return stream_length(dataset, key, declared)
    if declared is not None:
        raise UsageError(f"data.samples={declared}: is the length of a stream, {key} is none; leave it out")
    try:
        return len(cast(Any, dataset))
    except TypeError:
        kind = type(dataset).__name__
        raise UsageError(f"{key}: {kind} has no len(), and is no IterableDataset; give it one") from None
