"""Builds the train, eval and test splits from the configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from ..accum.batch import Nested, map_tensors, tensors
from ..config.instantiate import build
from ..config.schema import DataConfig
from ..environment.memory import free_bytes
from ..environment.random_state import drawn_from
from ..errors import UsageError
from .batches import Batches, ResidentBatches, Share
from .in_memory import InMemory
from .streamed import StreamedBatches
from .transforms import BatchAugment

RESIDENT_SHARE = 0.25
TRANSFORM_CHUNK = 4096


@dataclass(frozen=True)
class Splits:
    """The batches of training, of the evaluation at each epoch's end, and of the final test."""

    train: Batches
    eval: Batches
    test: Batches


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


def build_splits(config: DataConfig, seed: int, place: Placement, share: Share | None = None) -> Splits:
    """Builds the splits, resident on the device or streamed to it.

    Args:
        seed: the seed of the training order and augmentation.
        place: moves batches to the device.
        share: the part of every batch that this process reads; None for all of it.

    Raises:
        UsageError: if a data set is missing, cannot be downloaded, or has too few samples to train on.
    """
    batch_size = cast(int, config.batch_size)
    train_set = _dataset(config, config.train, "data.train")
    test_set = _dataset(config, config.test, "data.test")
    train_indices = torch.arange(_length(train_set, "data.train"))
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
    if not len(eval_indices):
        eval_set, eval_indices = test_set, test_indices

    transform = build(config.transform, "data.transform") if config.transform else None
    augment = build(config.augment, "data.augment") if config.augment else None
    batches = _BatchesFactory(config, transform, place)
    share = share or Share()
    whole = replace(share, steps=1)
    training: dict[str, Any] = {"shuffle": seed, "drop_last": config.drop_last, "share": share}
    return Splits(
        train=batches(train_set, train_indices, batch_size, augment, **training),
        eval=batches(eval_set, eval_indices, config.eval_batch_size, share=whole),
        test=batches(test_set, test_indices, config.eval_batch_size, share=whole),
    )


@dataclass
class _BatchesFactory:
    """Makes the batches of each split, resident or streamed; reads every resident data set once."""

    config: DataConfig
    transform: Callable[[Any], Any] | None
    place: Placement
    _read: dict[int, tuple[Nested, Nested]] = field(default_factory=dict)

    def __call__(
        self, dataset: Dataset[Any], indices: Tensor, batch_size: int, augment: Any = None, **options: Any
    ) -> Batches:
        on_device = augment if isinstance(augment, BatchAugment) else None
        by_sample: Any = None if on_device else augment
        if by_sample is None and self._resident(dataset):
            inputs, targets = self._tensors(dataset)
            return ResidentBatches(inputs, targets, indices, batch_size, augment=on_device, **options)
        if by_sample is not None and self.config.resident:
            raise UsageError(
                "data.resident=true: data.augment works sample by sample, so it needs "
                "data.resident=false, or a BatchAugment such as accumexp.data.ShiftAndFlip"
            )
        return StreamedBatches(
            dataset,
            indices,
            batch_size,
            transform=self.transform,
            sample_augment=by_sample,
            place=self.place,
            workers=self.config.workers,
            prefetch=self.config.prefetch,
            pin_memory=self.place.device.type == "cuda",
            augment=on_device,
            **options,
        )

    def _resident(self, dataset: Dataset[Any]) -> bool:
        if self.config.resident is not None:
            return self.config.resident
        raw = _raw_tensors(dataset)
        if raw is None:
            return False
        inputs, targets = map_tensors(lambda tensor: tensor[:1], raw)
        sample = self.place(self._transformed(inputs), targets)
        bytes_each = sum(tensor.nbytes for tensor in tensors(sample))
        return bytes_each * _length(dataset, "data") <= RESIDENT_SHARE * free_bytes(self.place.device)

    def _tensors(self, dataset: Dataset[Any]) -> tuple[Nested, Nested]:
        """The whole data set, transformed and on the device."""
        key = id(dataset)
        if key not in self._read:
            raw = _raw_tensors(dataset)
            inputs, targets = (self._transformed(raw[0]), raw[1]) if raw else self._read_samples(dataset)
            self._check_labels(targets)
            self._read[key] = self.place(inputs, targets)
        return self._read[key]

    def _check_labels(self, targets: Nested) -> None:
        classes = self.config.num_classes
        if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dim() > 1:
            return
        if classes != 1 and len(targets) and int(targets.max()) >= classes:
            raise UsageError(f"data.num_classes={classes}: the labels go up to {int(targets.max())}")

    def _transformed(self, inputs: Nested) -> Nested:
        transform = self.transform
        if transform is None:
            return inputs

        def in_chunks(tensor: Tensor) -> Tensor:
            chunks = tensor.split(TRANSFORM_CHUNK)
            return torch.cat([transform(chunk).as_subclass(Tensor) for chunk in chunks])

        return map_tensors(in_chunks, inputs)

    def _read_samples(self, dataset: Dataset[Any]) -> tuple[Nested, Nested]:
        from rich.progress import track

        def collate(samples: list[tuple[Any, Any]]) -> Any:
            transform = self.transform or (lambda sample: sample)
            return default_collate([(transform(inputs), targets) for inputs, targets in samples])

        with drawn_from(0):
            loader = DataLoader(dataset, batch_size=256, collate_fn=collate)
            steps = math.ceil(_length(dataset, "data") / 256)
            chunks = [tuple(chunk) for chunk in track(loader, "reading data", total=steps, transient=True)]
        columns = zip(*map(tensors, chunks), strict=True)
        whole = iter([torch.cat(column) for column in columns])
        return map_tensors(lambda _: next(whole), chunks[0])


def _raw_tensors(dataset: Dataset[Any]) -> tuple[Nested, Nested] | None:
    """(inputs, targets) of a data set that holds them as tensors, or None.

    Supports InMemory, TensorDataset and torchvision's uint8 images, unless indexing changes them.
    """
    kind = type(dataset)
    if isinstance(dataset, InMemory) and kind.__getitem__ is InMemory.__getitem__:
        return dataset.inputs, dataset.targets
    if isinstance(dataset, TensorDataset) and kind.__getitem__ is TensorDataset.__getitem__:
        *inputs, targets = dataset.tensors
        return inputs[0] if len(inputs) == 1 else tuple(inputs), targets
    plain = getattr(dataset, "transforms", None) is None
    if not (kind.__module__.startswith("torchvision.datasets") and plain):
        return None
    data, labels = getattr(dataset, "data", None), getattr(dataset, "targets", None)
    if data is None or labels is None:
        return None
    images = torch.as_tensor(data)
    if images.dtype != torch.uint8 or images.dim() not in (3, 4):
        return None
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return images, torch.as_tensor(labels)


def _dataset(config: DataConfig, node: Mapping[str, Any], key: str) -> Dataset[Any]:
    try:
        return build(node, key)
    except UsageError as error:
        cause = error.__cause__
        if isinstance(cause, OSError | RuntimeError):
            raise UsageError(
                f"data.root={config.root}: {error}; give the folder that holds the data, or a "
                "connection to download it"
            ) from cause
        raise


def _length(dataset: Dataset[Any], key: str) -> int:
    try:
        return len(cast(Any, dataset))
    except TypeError:
        raise UsageError(f"{key}: a map-style data set with a length is needed, not a stream") from None
