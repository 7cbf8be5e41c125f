"""Measures the peak memory of tensors on a device, as counted by torch's allocator."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from .sync import plain

# Silences the profiler's log of its start and stop; read at its first use.
QUIET = ("KINETO_LOG_LEVEL", "99")


class Peak:
    """The result of `measure_peak`, complete at its end.

    Attributes:
        start: bytes alive at the beginning.
        peak: the largest number of bytes alive at once.
        changes: bytes allocated (above 0) and freed (below 0), in order.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.peak = start
        self.changes: list[int] = []

    @property
    def alive(self) -> list[int]:
        """Bytes alive at the beginning and after each change."""
        return list(accumulate(self.changes, initial=self.start))

    @property
    def end(self) -> int:
        """Bytes alive at the end."""
        return self.start + sum(self.changes)


@contextmanager
def measure_peak(device: torch.device, before: int = 0) -> Iterator[Peak]:
    """Measures the peak bytes of tensors on `device`, as counted by its allocator.

    Includes the temporary memory of operators; excludes other processes, other libraries and DataLoader
    workers. On a GPU the peak is `torch.cuda.max_memory_allocated`. Cannot be nested, nor used inside a torch
    profiler. Costs as much as profiling.

    Args:
        before: on a CPU, the bytes that are alive at the beginning (`held_bytes`).
    """
    gc.collect()  # garbage freed inside would be counted as a decrease
    counts = device.type == "cuda"
    if counts:
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    measured = Peak(torch.cuda.memory_allocated(device) if counts else before)
    os.environ.setdefault(*QUIET)
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    try:
        with profiler:
            yield measured
    finally:
        kind = DeviceType.CUDA if counts else DeviceType.CPU
        measured.changes = _changes(profiler, kind)
        measured.peak = torch.cuda.max_memory_allocated(device) if counts else max(measured.alive)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages of `tensors`, each storage counted once."""
    storages = {}
    for tensor in tensors:
        storage = plain(tensor).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def extrapolated(small: tuple[int, Peak], large: tuple[int, Peak], size: int, beside: int = 0) -> int:
    """The peak in bytes at `size`, extrapolated from measurements of the same work at two other sizes.

    The bytes alive after each allocation are linear in the micro-batch's size. The peak is the maximum over
    these lines; if the measurements differ in their sequence of allocations, the line through the two peaks.

    Args:
        small, large: (size, measurement) at two different sizes.
        beside: bytes at `size` that the measurements do not include, added to the result.
    """
    (a, first), (b, second) = small, large
    same = alike(first, second)
    lines = zip(first.alive, second.alive, strict=True) if same else [(first.peak, second.peak)]
    return max(round(p + (q - p) * (size - a) / (b - a)) for p, q in lines) + beside


def alike(first: Peak, second: Peak) -> bool:
    """Whether two measurements have the same sequence of allocations and frees."""
    return len(first.changes) == len(second.changes) and all(
        (p > 0) == (q > 0) for p, q in zip(first.changes, second.changes, strict=True)
    )


def _changes(profiler: profile, kind: DeviceType) -> list[int]:
    results = getattr(profiler.profiler, "kineto_results", None)
    events = [] if results is None else results.events()
    memory = [e for e in events if e.name() == "[memory]" and e.device_type() == kind and e.nbytes()]
    memory.sort(key=lambda event: event.start_ns())
    return [event.nbytes() for event in memory]
