"""What all ranks know of each other's findings, so that all decide alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

Value = TypeVar("Value")


def ranks() -> int:
    """How many processes take part; 1 where torch.distributed is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if ranks() > 1 else 0


def all_gather(value: Value) -> list[Value]:
    """`value` of every rank, in their order. All ranks must call."""
    if ranks() == 1:
        return [value]
    values: list[Value | None] = [None] * ranks()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def worst(figures: Sequence[float]) -> float:
    """The largest, where nan is larger than everything."""
    return math.nan if any(map(math.isnan, figures)) else max(figures)
