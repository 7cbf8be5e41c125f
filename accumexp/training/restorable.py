"""Checks of saved states against the objects that they are restored into, for errors that come only later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Of these the state of a parameter has other shapes than the parameter.
FACTORED = ("Adafactor",)


def check_kinds(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: naming a weight that is complex or whole where the model's is not: torch converts it.
    """
    for name, value in model.state_dict().items():
        other = saved.get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            if _number_kind(value) != _number_kind(other):
                raise ValueError(f"{name} is of {other.dtype}, the model's of {value.dtype}")


def check_state(present: Any, saved: Any, name: str = "") -> None:
    """
    Raises:
        ValueError: naming a part of `saved` that is of another type than in the `present` state. A part that
            either lacks is not compared.
    """
    if present is None or saved is None:
        return
    if isinstance(present, Mapping) and isinstance(saved, Mapping):
        for key in present.keys() & saved.keys():
            check_state(present[key], saved[key], f"{name}.{key}" if name else str(key))
        return
    numbers = int | float | Tensor
    same = isinstance(present, numbers) and isinstance(saved, numbers)
    if not same and not isinstance(saved, type(present)) and not isinstance(present, type(saved)):
        raise ValueError(f"{name} is a {type(saved).__name__}, not a {type(present).__name__}")


def check_optimizer(optimizer: Optimizer) -> None:
    """
    Raises:
        ValueError: naming a restored part that is text, or of another shape than its parameter.
    """
    shaped = (
        type(optimizer).__module__.startswith("torch.optim.") and type(optimizer).__name__ not in FACTORED
    )
    for parameter, state in optimizer.state.items():
        if not isinstance(state, Mapping):
            raise ValueError(f"the optimizer's state of a parameter is a {type(state).__name__}")
        for name, value in state.items():
            if isinstance(value, str):
                raise ValueError(f"the optimizer's {name} is text")
            if shaped and isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"the optimizer's {name} is {tuple(value.shape)} of {tuple(parameter.shape)}"
                )


def _number_kind(value: Tensor) -> str:
    if value.is_complex():
        return "complex"
    return "float" if value.is_floating_point() else "bool" if value.dtype is torch.bool else "int"
