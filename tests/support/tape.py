"""A recorder that does on the CPU what a CUDA graph does: the same operators again, on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

# What writes to arguments of which its schema says nothing.
WRITES = {"native_batch_norm": ("running_mean", "running_var")}
# What the host has to wait for, which no stream that is recorded allows.
READS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero")


class Tape:
    """Records operators where Python calls them, with the tensors they are called on, and nothing of Python.

    As with a graph, recording changes nothing that was there before, a replay fills the tensors of the
    recording, and whatever Python would decide otherwise by then is as it was.
    """

    def __init__(self) -> None:
        self.recorded = 0
        self.replays = 0

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        self.recorded += 1
        drawn = torch.get_rng_state()
        with _Recording() as recording:
            results = function()
        torch.set_rng_state(drawn)
        recording.undo()

        @torch.no_grad()
        def replay() -> Any:
            self.replays += 1
            for operator, args, kwargs, made in recording.calls:
                outputs = pytree.tree_leaves(operator(*args, **kwargs))
                for old, new in zip(made, outputs, strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)
            return results

        return replay


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self._created: set[int] = set()  # storages made while recording
        self._before: dict[int, tuple[Any, Any]] = {}  # others that were written to, as they were

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
        for argument in func._schema.arguments:
            declared = argument.alias_info is not None and argument.alias_info.is_write
            if declared or argument.name in WRITES.get(name, ()):
                for tensor in pytree.tree_leaves(given.get(argument.name)):
                    self._keep(tensor)
        there = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        self._created |= {t.untyped_storage().data_ptr() for t in _tensors(result)} - there
        self.calls.append((func, args, kwargs, pytree.tree_leaves(result)))
        return result

    def _keep(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._created:
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def undo(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)


def _tensors(node: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node) if isinstance(leaf, Tensor)]
