"""The machine under a run: its device, its memory, its threads, and what code it runs."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from ..errors import UsageError

MIB = 2**20


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one.

    Raises:
        UsageError: for a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device={name}: {reason}; auto, cpu, cuda or cuda:<n>") from error
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def tf32(device: torch.device) -> bool:
    """Whether products of fp32 numbers may be rounded to TF32's 10 bits: on a GPU, unless it is forbidden."""
    if device.type != "cuda":
        return False
    return bool(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak: jobs of a sweep may share a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            # Linux: 5 resets the peak of the resident set (proc(5), clear_refs).
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass


def peak_memory_mib(device: torch.device) -> float:
    """MiB: what torch allocated on a GPU, or the process's peak resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)  # bytes there, KiB elsewhere: getrusage(2)


def free_bytes(device: torch.device) -> int:
    """Bytes that tensors may still take: of a GPU what nobody uses and what torch keeps without using it,
    of a CPU what the machine has available, or this process's control group if that is less."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return min([psutil.virtual_memory().available, *_free_of_group()])


def _free_of_group(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What a container may still take, as Linux's control groups of version 2 and 1 tell it; or nothing."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((root / limit).read_text())  # a version 2 group without a limit says "max"
            statistics = (root / limit).with_name("memory.stat").read_text().split()
            freed_at_need = int(statistics[statistics.index(cached) + 1])
            return [max(0, most - int((root / used).read_text()) + freed_at_need)]
        except (OSError, ValueError):
            continue
    return []


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def git(folder: Path, *arguments: str) -> str | None:
    """What git says in `folder`, or None where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def code_version() -> tuple[str, str]:
    """(git sha, diff against it) of this package's checkout, or (version, "") of an installed wheel."""
    from .. import __version__

    package = Path(__file__).resolve().parents[1]
    tracked = git(package, "ls-files", "--error-unmatch", "__init__.py")
    sha = git(package, "rev-parse", "HEAD") if tracked else None
    if sha is None:
        return __version__, ""
    return sha.strip(), git(package, "diff", "HEAD") or ""


def cores() -> int:
    """Cores that this process may use: of the machine, its affinity and its control group."""
    from joblib import cpu_count

    return cpu_count()
