"""Samples of somebody else's training loop, recognised by the content of what the model receives."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .nested import tensors_by_path
from .sample_ids import row_count

# Values that fill token ids and labels up to a common length.
PADDING = (0, -100)


def sample_keys(arguments: Any) -> list[int]:
    """A number for each sample of a call's `arguments`, made from its rows of all tensors.

    Padding is left out, because its length depends on the other samples of the micro-batch: positions that an
    attention mask excludes, or trailing 0 and -100 of integer tensors where there is no mask.
    """
    size = row_count(arguments)
    columns = [(path, t.detach()) for path, t in tensors_by_path(arguments) if t.dim() and len(t) == size]
    mask = _mask(columns, size)
    digests = [hashlib.blake2b(digest_size=8) for _ in range(size)]
    for _, tensor in columns:
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor.resolve_conj())
        rows = (tensor.double() + 0.0).cpu()  # without negative zeros
        integers = tensor.dim() == 2 and not tensor.is_floating_point()
        for index, digest in enumerate(digests):
            row = rows[index]
            if mask is not None and row.dim() and len(row) == mask.shape[1]:
                row = row[mask[index]]
            elif mask is None and integers:
                row = _without_padding(row)
            digest.update(row.contiguous().numpy().tobytes())
    return [int.from_bytes(digest.digest(), "big") >> 2 for digest in digests]  # fits an int64


def _mask(columns: list[tuple[str, Tensor]], size: int) -> Tensor | None:
    """The positions that count, by sample, of shape (samples, positions); None without a mask."""
    for path, tensor in columns:
        if "mask" in path and tensor.dim() == 2 and not tensor.is_floating_point() and size:
            mask = tensor.cpu() != 0
            if bool(((tensor == 0) | (tensor == 1)).all()) and bool(mask.any(1).all()):
                return mask
    return None


def _without_padding(row: Tensor) -> Tensor:
    counts = torch.ones_like(row, dtype=torch.bool)
    for value in PADDING:
        counts &= row != value
    kept = counts.nonzero()
    return row[: int(kept[-1]) + 1] if len(kept) else row[:0]


def multiset(samples: Iterable[Iterable[int]]) -> Counter[int]:
    return Counter(sample for each in samples for sample in each)


def epochs_of(windows: Iterable[Iterable[int]]) -> list[list[int]]:
    """By window, the epochs that its samples belong to: how often each was seen before it, from 0."""
    seen: Counter[int] = Counter()
    epochs = []
    for window in windows:
        numbers = set()
        for sample in window:
            numbers.add(seen[sample])
            seen[sample] += 1
        epochs.append(sorted(numbers))
    return epochs
