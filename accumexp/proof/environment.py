"""The environment that a certificate records."""

from __future__ import annotations

import platform
from typing import Any

import torch

from .problem import Problem


def precision_name(problem: Problem) -> str:
    """The run's precision as checks name it, such as "bf16" or "loss-scaled fp16"."""
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    name = names[problem.autocast or problem.dtype]
    return name if problem.scaling is None else f"loss-scaled {name}"


def environment(problem: Problem) -> dict[str, Any]:
    device = problem.device
    processor = platform.processor() or platform.machine()
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.type} ({processor})",
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
