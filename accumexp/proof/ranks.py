"""Process group queries and gathers, which also work where torch.distributed is not initialised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def world_size() -> int:
    """Number of ranks; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def all_gather(value: Value) -> list[Value]:
    """`value` of every rank, in rank order. A collective call."""
    if world_size() == 1:
        return [value]
    values: list[Value | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def worst(figures: Sequence[float]) -> float:
    """The largest figure; nan if any is nan."""
    return math.nan if any(map(math.isnan, figures)) else max(figures)
