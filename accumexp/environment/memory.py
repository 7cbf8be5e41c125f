"""Free memory of a device."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

MIB = 2**20


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak: jobs of a sweep may share a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def free_bytes(device: torch.device) -> int:
    """Bytes that tensors may still take on `device`.

    On a GPU: the free memory, and what torch has reserved without using it. On a CPU: the machine's
    available memory, or that of this process's control group if it is less.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min([psutil.virtual_memory().available, *_cgroup_free_bytes()])


def _cgroup_free_bytes(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes left to a Linux control group of version 2 or 1, as a list of one; empty without a limit."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((root / limit).read_text())  # "max" for a version 2 group without a limit
            statistics = (root / limit).with_name("memory.stat").read_text().split()
            reclaimable = int(statistics[statistics.index(cached) + 1])
            return [max(0, most - int((root / used).read_text()) + reclaimable)]
        except (OSError, ValueError):
            continue
    return []
