"""The device that a process computes on."""

from __future__ import annotations

import os
import platform

import torch

from ..errors import UsageError


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU if there is one.

    Raises:
        UsageError: for a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] == "meta":
        raise UsageError(f"device={name}: holds no numbers to train; take auto, cpu, cuda or cuda:<n>")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        remedy = "auto, cpu, cuda or cuda:<n>"
        if name.startswith("cuda"):
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            remedy = (
                f"take cuda:<n> below {count}, cpu or auto" if count else "take device=cpu or device=auto"
            )
        raise UsageError(f"device={name}: {reason.rstrip('.')}; {remedy}") from error
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


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
