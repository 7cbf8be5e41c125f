"""What data sets hold in memory, without being read sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ..accum.batch import Nested
from .in_memory import InMemory
from .samples import Layout


def raw_tensors(dataset: Dataset[Any], layout: Layout) -> tuple[Nested, Nested] | None:
    """(inputs, targets) of a data set that holds them as tensors, or None.

    Supports InMemory, TensorDataset and torchvision's data sets with uint8 images in `.data`, unless a
    subclass or transform changes what indexing returns.
    """
    kind = type(dataset)
    if isinstance(dataset, InMemory) and kind.__getitem__ is InMemory.__getitem__:
        return layout.separate((dataset.inputs, dataset.targets), "data")
    if isinstance(dataset, TensorDataset) and kind.__getitem__ is TensorDataset.__getitem__:
        return layout.separate(dataset.tensors, "data")
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
    return layout.separate((images, torch.as_tensor(labels)), "data")


def concatenated(chunks: list[Nested]) -> Nested:
    first = chunks[0]
    if isinstance(first, Tensor):
        return torch.cat(cast(list[Tensor], chunks))
    if isinstance(first, Mapping):
        return {key: concatenated([cast(Mapping, chunk)[key] for chunk in chunks]) for key in first}
    columns = (concatenated(list(column)) for column in zip(*chunks, strict=True))
    return getattr(type(first), "_make", type(first))(columns)
