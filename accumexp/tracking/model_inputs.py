"""The signature and the input example of a run's logged models, inferred from its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def described_inputs(inputs: Any, outputs: Any, ragged: bool = False) -> dict[str, Any]:
    """The signature and the input example of a model, as JSON takes them; empty for inputs without one.

    Args:
        inputs: a batch of samples as the model takes it: a tensor, a dict, or a tuple of tensors.
        outputs: of the model, None if they are not known.
        ragged: whether samples differ in their shape.
    """
    columns = _columns(inputs, "input")
    if columns is None:
        return {}
    of_outputs = None if outputs is None else _columns(outputs, "output")
    values = {name: _numbers(_array(tensor[:1])) for name, tensor in columns.items()}
    return {
        "signature": {
            "inputs": [_spec(name, tensor, ragged) for name, tensor in columns.items()],
            "outputs": [_spec(name, tensor, ragged) for name, tensor in (of_outputs or {}).items()],
        },
        "example": values[""] if "" in values else values,
    }


def _columns(batch: Any, prefix: str) -> dict[str, Tensor] | None:
    """The tensors by name, one alone by an empty name; None for anything but tensors in one container."""
    if isinstance(batch, Tensor):
        return {"": batch}
    if isinstance(batch, Mapping):
        columns = {str(name): value for name, value in batch.items()}
    elif isinstance(batch, tuple | list):
        columns = {f"{prefix}_{number}": value for number, value in enumerate(batch)}
    else:
        return None
    flat = all(isinstance(value, Tensor) and value.dim() for value in columns.values())
    return columns if columns and flat else None


def _array(tensor: Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()  # NumPy has no bfloat16


def _numbers(array: np.ndarray) -> list[Any]:
    """`array` as nested lists; its floats with the digits that their type needs, as JSON writes all 17."""
    if array.dtype.kind != "f":
        return array.tolist()
    return np.array([float(str(number)) for number in array.flat]).reshape(array.shape).tolist()


def _spec(name: str, tensor: Tensor, ragged: bool) -> dict[str, Any]:
    shape = [-1] * tensor.dim() if ragged else [-1, *tensor.shape[1:]]
    spec = {"type": "tensor", "tensor-spec": {"dtype": str(_array(tensor[:1]).dtype), "shape": shape}}
    return {"name": name, **spec} if name else spec
