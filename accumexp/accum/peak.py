"""How many bytes of tensors are alive on a device at once, as torch's own allocator counts them."""

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

# Told before its first use, or torch's profiler says in its log that it starts and stops.
QUIET = ("KINETO_LOG_LEVEL", "99")


class Peak:
    """What `measure_peak` found; complete when it has ended.

    Attributes:
        start: bytes alive at the beginning.
        peak: the most bytes that were alive at once.
        changes: bytes allocated (above 0) and freed (below 0), one after the other.
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
    """Measures the peak of the bytes of tensors on `device`, as its allocator counts them.

    That is all that torch allocates, what operators need while they run included. On a GPU it is
    `torch.cuda.max_memory_allocated`, which knows what was there before. On a CPU torch counts only while
    it is profiled, and `before` are the bytes that were there already (`held_bytes`). What other processes
    and libraries take, and the workers of a DataLoader, is not in it.

    One at a time, and not inside a profiler of torch. Costs as much as profiling does: use it for a few
    updates, not for a run.
    """
    gc.collect()  # what is left of others would be freed inside, and not counted
    counts = device.type == "cuda"
    if counts:
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    found = Peak(torch.cuda.memory_allocated(device) if counts else before)
    os.environ.setdefault(*QUIET)
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    try:
        with profiler:
            yield found
    finally:
        kind = DeviceType.CUDA if counts else DeviceType.CPU
        found.changes = _changes(profiler, kind)
        found.peak = torch.cuda.max_memory_allocated(device) if counts else max(found.alive)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes in memory behind `tensors`, each storage once."""
    storages = {}
    for tensor in tensors:
        storage = plain(tensor).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def extrapolated(small: tuple[int, Peak], large: tuple[int, Peak], size: int, beside: int = 0) -> int:
    """The peak in bytes at `size`, from those of the same work at two other sizes.

    The bytes of every tensor are linear in the size of a micro-batch, so those that are alive are, at every
    place of the work; the peak is the maximum over the places, which need not be the same at all sizes.
    Where the allocator was not asked for the same things in the same order, it is the line through the two
    peaks.

    Args:
        small, large: (size, what was measured) at two different sizes.
        beside: bytes at `size` that are no part of what was measured.
    """
    (a, first), (b, second) = small, large
    pairs = zip(first.alive, second.alive, strict=True) if alike(first, second) else ()
    lines = [(first.peak, second.peak)] if not pairs else pairs
    return max(round(p + (q - p) * (size - a) / (b - a)) for p, q in lines) + beside


def alike(first: Peak, second: Peak) -> bool:
    """Whether the allocator was asked for the same things in the same order."""
    return len(first.changes) == len(second.changes) and all(
        (p > 0) == (q > 0) for p, q in zip(first.changes, second.changes, strict=True)
    )


def _changes(profiler: profile, kind: DeviceType) -> list[int]:
    results = getattr(profiler.profiler, "kineto_results", None)
    events = [] if results is None else results.events()
    memory = [e for e in events if e.name() == "[memory]" and e.device_type() == kind and e.nbytes()]
    memory.sort(key=lambda event: event.start_ns())
    return [event.nbytes() for event in memory]
