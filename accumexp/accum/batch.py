"""Splits the batch of one update into the micro-batches of its window.

A batch is a tensor whose first dimension is the sample, or any nesting of tuples, lists and dicts of
such tensors. Splitting returns views: no data is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

Nested = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def batch_size(batch: Nested) -> int:
    """The number of samples: the first dimension, which all tensors of `batch` share.

    Raises:
        ValueError: if `batch` holds no tensor, or its tensors differ in their first dimension.
    """
    sizes = [tensor.shape[0] if tensor.dim() else 0 for tensor in tensors(batch)]
    if not sizes or sizes.count(sizes[0]) != len(sizes):
        problem = f"first dimensions {sorted(set(sizes))}" if sizes else "no tensor"
        raise ValueError(f"a batch needs tensors that share their first dimension, found {problem}")
    return sizes[0]


def tensors(batch: Nested) -> list[Tensor]:
    """The tensors of a nested batch, left to right."""
    if isinstance(batch, Tensor):
        return [batch]
    # Mapping last: its isinstance check is the slowest.
    if isinstance(batch, tuple | list):
        return [tensor for value in batch for tensor in tensors(value)]
    if isinstance(batch, Mapping):
        return [tensor for value in batch.values() for tensor in tensors(value)]
    raise ValueError(f"a batch holds tensors, tuples, lists and dicts, not {type(batch).__name__}")


def map_tensors(function: Callable[[Tensor], Any], batch: Nested) -> Any:
    """`batch` with `function` applied to every tensor."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    return _like(batch, (map_tensors(function, value) for value in batch))


def _like(batch: tuple[Any, ...] | list[Any], values: Iterable[Any]) -> Any:
    """`values` as a sequence of the type of `batch`; a named tuple takes them one by one."""
    make = getattr(type(batch), "_make", type(batch))
    return make(values)


def call(model: nn.Module, inputs: Nested) -> Any:
    """Calls `model` with a tensor, the items of a tuple or list, or the named values of a dict."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def split_sizes(samples: int, steps: int, *, empty: bool = False) -> list[int]:
    """The sizes of `steps` micro-batches, which differ by at most one, the larger ones first.

    Args:
        empty: allow more micro-batches than samples; the rest have size 0.

    Raises:
        ValueError: unless 1 <= steps <= samples (1 <= steps with `empty`).
    """
    if steps < 1 or steps > samples and not empty:
        raise ValueError(f"{samples} samples cannot be split into {steps} micro-batches")
    smaller, larger = divmod(samples, steps)
    return [smaller + 1] * larger + [smaller] * (steps - larger)


def split(batch: Nested, sizes: list[int], dim: int = 0) -> list[Nested]:
    """Splits the tensors of `batch` along `dim` into parts of `sizes` samples, nested as `batch` is."""
    if len(sizes) == 1:
        return [batch]
    if isinstance(batch, Tensor):
        return list(batch.split(sizes, dim))
    if isinstance(batch, Mapping):
        columns = {key: split(value, sizes, dim) for key, value in batch.items()}
        return [{key: column[k] for key, column in columns.items()} for k in range(len(sizes))]
    rows = zip(*(split(value, sizes, dim) for value in batch), strict=True)
    return [_like(batch, row) for row in rows]


def steps_for(samples: int, full_batch: int, full_steps: int) -> int:
    """The number of micro-batches for a window of `samples`, where `full_batch` takes `full_steps`.

    ceil(samples * full_steps / full_batch), so that its micro-batches are no larger than a full window's.
    """
    return max(1, -(-samples * full_steps // full_batch))


def rank_share(samples: int, steps: int, rank: int, ranks: int) -> list[range]:
    """The samples of a batch that `rank` computes, one range for each of its `steps` micro-batches.

    The batch is split into micro-batches as on one process, and each micro-batch over the ranks. A range is
    empty if a micro-batch has fewer samples than ranks.
    """
    shares = []
    begin = 0
    for size in split_sizes(samples, steps, empty=True):
        parts = split_sizes(size, ranks, empty=True)
        first = begin + sum(parts[:rank])
        shares.append(range(first, first + parts[rank]))
        begin += size
    return shares
