"""Batches, arguments and outputs in any nesting: tensors with the samples first, and anything beside them.

Unlike `accumexp.accum.batch`, which refuses what a window cannot split, these functions pass numbers, None,
strings and objects without tensors through, and tensors of shape () (a count of the batch's items) too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch._C import _functorch  # type: ignore[attr-defined]

# Objects that are not searched for tensors.
OPAQUE = (nn.Module, ModuleType, type)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in `value`, in order: in tuples, lists, mappings, dataclasses and attributes of objects."""
    return [tensor for _, tensor in tensors_by_path(value)]


def is_transformed(tensor: Tensor) -> bool:
    """Whether `tensor` is a wrapper of torch.func's (grad, vmap), which has no memory of its own."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def unwrapped(tensor: Tensor) -> tuple[Tensor, int]:
    """(the tensor below torch.func's wrappers, how many of its first dimensions vmap maps over)."""
    dims = []  # of the outermost vmap first
    while is_transformed(tensor):
        if _functorch.is_batchedtensor(tensor):
            dims.append(_functorch.maybe_get_bdim(tensor))
        tensor = _functorch.get_unwrapped(tensor)
    plain = tensor.detach()
    for count, dim in enumerate(reversed(dims)):
        plain = plain.movedim(dim + count, 0)
    return plain, len(dims)


def tensors_by_path(value: Any) -> list[tuple[str, Tensor]]:
    """The tensors in `value`, each with its path, such as "[1]" or ".logits"."""
    return _tensors(value, "", ())


def samples_first(value: Any) -> list[Tensor]:
    """The tensors in `value` that have a first dimension."""
    return [tensor for tensor in tensors(value) if tensor.dim()]


def batch_size(batch: Any) -> int:
    """The number of samples: the first dimension, which all tensors of `batch` with dimensions share.

    Raises:
        ValueError: if there is no such tensor, or if they differ in their first dimension.
    """
    sizes = [tensor.shape[0] for tensor in samples_first(batch)]
    if not sizes or sizes.count(sizes[0]) != len(sizes):
        problem = f"first dimensions {sorted(set(sizes))}" if sizes else "no tensor with a dimension"
        raise ValueError(f"a batch needs tensors that share their first dimension, found {problem}")
    return sizes[0]


def map_tensors(
    function: Callable[[Tensor], Any], value: Any, other: Callable[[Any], Any] = lambda leaf: leaf
) -> Any:
    """`value` with `function` applied to every tensor, and `other` to everything else that holds none."""
    return _map(function, other, value, ())


def cloned(value: Any) -> Any:
    """`value` with copies of its tensors, without their graph, and of the objects beside them."""
    return map_tensors(_clone, value, _copied)


def _tensors(value: Any, path: str, above: tuple[int, ...]) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(path, value)]
    if id(value) in above:  # an object that refers to itself
        return []
    above = (*above, id(value))
    keyed = isinstance(value, tuple | list | Mapping)
    return [
        tensor
        for key, part in _parts(value).items()
        for tensor in _tensors(part, f"{path}[{key!r}]" if keyed else f"{path}.{key}", above)
    ]


def _parts(value: Any) -> Mapping[Any, Any]:
    """What `value` consists of, by key, index or attribute; empty for a leaf."""
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if isinstance(value, Mapping):
        return value
    if isinstance(value, OPAQUE) or callable(value):
        return {}
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names if hasattr(value, name)}
    return getattr(value, "__dict__", {})


def _map(
    function: Callable[[Tensor], Any], other: Callable[[Any], Any], value: Any, above: tuple[int, ...]
) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    container = isinstance(value, tuple | list | Mapping)
    if not container and (id(value) in above or not tensors(value)):
        return other(value)
    above = (*above, id(value))
    return _rebuilt(value, {key: _map(function, other, part, above) for key, part in _parts(value).items()})


def _rebuilt(value: Any, parts: dict[Any, Any]) -> Any:
    """An object of the type of `value` that consists of `parts`."""
    if isinstance(value, tuple | list):
        make = getattr(type(value), "_make", type(value))  # a named tuple takes its items one by one
        return make(parts.values())
    if not isinstance(value, Mapping):
        rebuilt = copy.copy(value)
        for name, part in parts.items():
            object.__setattr__(rebuilt, name, part)  # of a frozen dataclass too
        return rebuilt
    if not isinstance(value, dict | UserDict) or type(value) is dict:
        return parts
    rebuilt = copy.copy(value)
    for key, part in parts.items():
        rebuilt[key] = part
    return rebuilt


def _clone(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _copied(value: Any) -> Any:
    if isinstance(value, OPAQUE) or callable(value):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # an object that cannot be copied (a lock, a generator) is shared
        return value
