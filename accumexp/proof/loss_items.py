"""The items of a batch that a loss may average over, and nested values with tensors of samples."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# Target values that commonly mark what does not count.
IGNORED = (-100, -1, 255, 0)
# Values of one target tensor that are tried.
VALUES = 16
Count = Callable[[Tensor], float]


def item_counts(
    leaf: Tensor, where: str, alone: bool, ignore_index: int | None
) -> Iterator[tuple[str, Count]]:
    """What of a tensor a loss may average over: `likely_counts` first, then its elements by value.

    Arguments and results are those of `likely_counts`.
    """
    yield from likely_counts(leaf, where, alone, ignore_index)
    if not alone and is_mask(leaf):
        return
    for value in leaf.unique()[:VALUES].tolist():
        yield f"{{:g}} {where} other than {value:g}", functools.partial(_other_than, value)
        yield f"{{:g}} {where} equal to {value:g}", lambda rows, v=value: float((rows == v).sum())


def likely_counts(
    leaf: Tensor, where: str, alone: bool, ignore_index: int | None
) -> Iterator[tuple[str, Count]]:
    """What of a tensor a loss commonly averages over, the likeliest first.

    Args:
        where: "targets", "outputs" or "inputs".
        alone: whether it is the only tensor there.
        ignore_index: of the loss, or None.

    Returns:
        Descriptions with a place for the number, and functions that count in the rows of some samples.
    """
    if leaf.is_floating_point():
        yield f"{{:g}} {where} that are not nan", functools.partial(_other_than, math.nan)
    if not alone and is_mask(leaf):
        yield f"the {{:g}} elements of a mask among the {where}", functools.partial(_other_than, 0)
        return
    if not leaf.is_floating_point():
        for value in dict.fromkeys(v for v in (ignore_index, *IGNORED[:3]) if v is not None):
            yield _valid(where, value), functools.partial(_other_than, value)
        yield f"{{:g}} valid {where} (those not below 0)", lambda rows: float((rows >= 0).sum())
    yield f"{{:g}} {where} other than 0", functools.partial(_other_than, 0)
    yield f"weights among the {where}, whose sum is {{:g}}", lambda rows: float(rows.double().nansum())
    if leaf.dim() > 1 and leaf.shape[1] > 1 and not leaf.is_floating_point():
        # A language model that predicts the next token has no loss for the first one.
        for value in dict.fromkeys(v for v in (ignore_index, *IGNORED) if v is not None):
            text = f"{_valid(where, value)} after the first of each sample"
            yield text, lambda rows, v=value: _other_than(v, rows[:, 1:])


def is_mask(leaf: Tensor) -> bool:
    return bool(((leaf == 0) | (leaf == 1)).all())


def ignore_index_of(loss: Any) -> int | None:
    """`ignore_index` of a loss, or of the function that a partial calls."""
    keywords = loss.keywords if isinstance(loss, functools.partial) else {}
    value = getattr(loss, "ignore_index", keywords.get("ignore_index"))
    return value if isinstance(value, int) else None


def with_ignored(leaf: Tensor, ignore_index: int | None) -> Iterator[tuple[str, Count, Tensor]]:
    """Copies of a target tensor whose first sample has elements that a loss may ignore.

    None for one target a sample, which has no padding, unless all its values are 1, as in a mask.
    """
    marks: list[tuple[float, str]] = []
    if bool(leaf.eq(1).all()):
        marks = [(0, "the {:g} elements of a mask among the targets")]
    elif leaf[0].numel() > 1 and leaf.is_floating_point():
        marks = [(math.nan, "{:g} targets that are not nan")]
    elif leaf[0].numel() > 1:
        values = dict.fromkeys(v for v in (ignore_index, *IGNORED) if v is not None)
        marks = [(value, _valid("targets", value)) for value in values if value >= 0 or leaf.dtype.is_signed]
    for mark, description in marks:
        changed = leaf.clone(memory_format=torch.contiguous_format)
        changed[0].view(-1)[: max(1, leaf[0].numel() // 2)] = mark
        yield description, functools.partial(_other_than, mark), changed


def _valid(where: str, value: float) -> str:
    return f"{{:g}} valid {where} (those other than {value:g})"


def _other_than(value: float, rows: Tensor) -> float:
    return float((~rows.isnan() if math.isnan(value) else rows != value).sum())


def map_leaves(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """`tree` with `function` applied to its tensors. Knows dataclasses beside what torch's pytree does."""

    def mapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changed = copy.copy(value)
            for field in dataclasses.fields(value):
                object.__setattr__(changed, field.name, map_leaves(function, getattr(value, field.name)))
            return changed
        if isinstance(value, Mapping):
            return {key: map_leaves(function, item) for key, item in value.items()}
        return value

    return tree_map(mapped, tree)


def leaves(tree: Any) -> list[Tensor]:
    """The tensors in `tree`, in the order of `map_leaves`."""
    collected: list[Tensor] = []
    map_leaves(collected.append, tree)
    return collected


def samples_of(tree: Any, rows: Any, samples: int) -> Any:
    """Copies of the samples `rows` of every tensor in `tree` that has a dimension of `samples`."""
    return map_leaves(lambda t: t[rows].clone() if has_samples(t, samples) else t, tree)


def has_samples(tensor: Tensor, samples: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == samples
