"""Measures the bytes saved for backward, and recognises out-of-memory errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .sync import plain

# Messages of allocators below torch, whose errors have no class of their own.
_SHORT = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "MPS backend out of memory",
    # cuDNN, when no algorithm's workspace fits.
    "unable to find an engine to execute this computation",
    "Triton Error [CUDA]: out of memory",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an out-of-memory error of the device or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)


class SavedActivations:
    """The peak of bytes saved for backward while `measure_activations` is active, on any device.

    Counts the storages that autograd keeps for backward, without parameters, buffers and the batch.

    Attributes:
        peak_bytes: the largest sum of storages alive at once, in bytes.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._live_bytes = 0
        self._storages: dict[int, list[int]] = {}  # data pointer: [tensors alive, bytes]
        self._owned: set[int] = set()

    @property
    def live_bytes(self) -> int:
        """The bytes alive now."""
        return self._live_bytes

    def exclude(self, tensors: Iterable[Tensor]) -> None:
        self._owned.update(plain(tensor).untyped_storage().data_ptr() for tensor in tensors)

    def pack(self, tensor: Tensor) -> _Saved:
        return _Saved(self, tensor)

    def add(self, tensor: Tensor) -> int | None:
        """Counts `tensor` and returns the key to `drop` it by, or None if it is no activation."""
        # By its type: a fully sharded parameter is gathered into memory that `exclude` could not see.
        origin = tensor._base if tensor._is_view() else tensor
        storage = tensor.untyped_storage().data_ptr()
        if isinstance(origin, nn.Parameter) or storage in self._owned:
            return None
        entry = self._storages.setdefault(storage, [0, 0])
        grown = max(entry[1], tensor.numel() * tensor.element_size())
        self._live_bytes += grown - entry[1]
        entry[:] = entry[0] + 1, grown
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        return storage

    def start_anew(self) -> None:
        """Resets the peak to the bytes alive now, after a discarded window."""
        self.peak_bytes = self._live_bytes

    def drop(self, storage: int) -> None:
        entry = self._storages[storage]
        entry[0] -= 1
        if not entry[0]:
            self._live_bytes -= entry[1]
            del self._storages[storage]


class _Saved:
    """A saved tensor that is no longer counted once autograd releases it."""

    def __init__(self, saved: SavedActivations, tensor: Tensor) -> None:
        # Without its graph: a cycle with it would never be freed if no backward runs.
        self.tensor = tensor.detach()
        self._saved = saved
        self._storage = saved.add(tensor)

    def __del__(self) -> None:
        if self._storage is not None:
            self._saved.drop(self._storage)


@contextmanager
def measure_activations(model: nn.Module, batch: Iterable[Tensor]) -> Iterator[SavedActivations]:
    """Measures the activations, in bytes, that forward passes of `model` on `batch` save for backward.

    Costs a Python call per saved tensor: use it for a window, not for a run.
    """
    saved = SavedActivations()
    saved.exclude(model.parameters())
    saved.exclude(model.buffers())
    saved.exclude(batch)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda packed: packed.tensor):
        yield saved
