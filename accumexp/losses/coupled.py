"""What the losses that couple samples have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])


def couples(function: Function) -> Function:
    """Declares that `function` is a loss whose value for one sample depends on the others."""
    function.couples = True  # type: ignore[attr-defined]
    return function


class Coupled(nn.Module):
    """Base of the losses that couple samples. A window computes them on all its outputs at once."""

    couples = True


def positive(name: str, value: float) -> float:
    """`value`, which is above 0.

    Raises:
        ValueError: if it is not.
    """
    if not value > 0:
        raise ValueError(f"{name}={value}: a number above 0 is needed")
    return value
