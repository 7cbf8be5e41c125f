"""Splitting the batch of one update into the micro-batches of its window.

A batch is a tensor whose first dimension is the sample, or any nesting of tuples, lists and dicts of
such tensors. Splitting makes views: no data is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Nested = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def batch_size(batch: Nested) -> int:
    """Number of samples: the first dimension, which all tensors of `batch` share.

    Raises:
        ValueError: if there is no tensor, or two tensors disagree.
    """
    sizes = [tensor.shape[0] if tensor.dim() else 0 for tensor in tensors(batch)]
    if not sizes or sizes.count(sizes[0]) != len(sizes):
        found = f"first dimensions {sorted(set(sizes))}" if sizes else "no tensor"
        raise ValueError(f"a batch needs tensors that share their first dimension, found {found}")
    return sizes[0]


def tensors(batch: Nested) -> list[Tensor]:
    """The tensors of a nested batch, left to right."""
    if isinstance(batch, Tensor):
        return [batch]
    # Mapping last: to know one takes longer than all the rest.
    if isinstance(batch, tuple | list):
        return [tensor for value in batch for tensor in tensors(value)]
    if isinstance(batch, Mapping):
        return [tensor for value in batch.values() for tensor in tensors(value)]
    raise ValueError(f"a batch holds tensors, tuples, lists and dicts, not {type(batch).__name__}")


def map_tensors(function: Callable[[Tensor], Any], batch: Nested) -> Any:
    """`batch` with every tensor replaced by `function` of it."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    return type(batch)(map_tensors(function, value) for value in batch)


def split_sizes(samples: int, steps: int, *, empty: bool = False) -> list[int]:
    """Sizes of `steps` micro-batches that differ by one at most, the larger ones first.

    Raises:
        ValueError: unless 1 <= steps <= samples; `empty` allows micro-batches of no samples.
    """
    if steps < 1 or steps > samples and not empty:
        raise ValueError(f"{samples} samples cannot be split into {steps} micro-batches")
    smaller, larger = divmod(samples, steps)
    return [smaller + 1] * larger + [smaller] * (steps - larger)


def split(batch: Nested, sizes: list[int]) -> list[Nested]:
    """`batch` cut along its first dimension into pieces of `sizes` samples, each nested as `batch` is."""
    if len(sizes) == 1:
        return [batch]
    if isinstance(batch, Tensor):
        return list(batch.split(sizes))
    if isinstance(batch, Mapping):
        columns = {key: split(value, sizes) for key, value in batch.items()}
        return [{key: column[k] for key, column in columns.items()} for k in range(len(sizes))]
    rows = zip(*(split(value, sizes) for value in batch), strict=True)
    return [type(batch)(row) for row in rows]


def steps_for(samples: int, full_batch: int, full_steps: int) -> int:
    """Micro-batches of a window of `samples` when `full_batch` samples are split into `full_steps`.

    A full batch takes exactly `full_steps`; the last, smaller batch of an epoch takes as many as keep
    its micro-batches no larger than a full window's: ceil(samples * full_steps / full_batch).
    """
    return max(1, -(-samples * full_steps // full_batch))


def rank_share(samples: int, steps: int, rank: int, ranks: int) -> list[range]:
    """The samples of a batch that `rank` takes, one range for each of its `steps` micro-batches.

    The batch is cut into micro-batches as one process would cut it, and each of them over the ranks, so
    that the k-th micro-batch of all ranks together holds the same samples at any number of ranks. Ranges
    are empty where there are fewer samples than ranks.
    """
    shares = []
    begin = 0
    for size in split_sizes(samples, steps, empty=True):
        parts = split_sizes(size, ranks, empty=True)
        own = begin + sum(parts[:rank])
        shares.append(range(own, own + parts[rank]))
        begin += size
    return shares
