"""What a proof was made on, in words."""

from __future__ import annotations

import platform
from typing import Any

import torch

from .problem import Problem


def precision_name(problem: Problem) -> str:
    names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    name = names[problem.autocast or problem.dtype]
    if problem.scaling is not None:
        name = f"loss-scaled {name}"
    return name


def environment(problem: Problem) -> dict[str, Any]:
    device = problem.device
    kind = platform.processor() or platform.machine()
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.type} ({kind})",
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
