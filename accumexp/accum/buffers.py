"""fp32 accumulation for parameters of lower precision.

Adding N bf16 gradients in bf16 loses up to N/2 units in the last of 8 bits; adding them in fp32 and
rounding once loses half a unit at any N. It costs one fp32 buffer per low-precision parameter, so it is
off by default.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .ranks import Ranks

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Fp32Buffers:
    """Accumulates the gradients of low-precision parameters in fp32 while a window is open.

    A hook moves each micro-batch's gradient from `.grad` into the buffer as soon as autograd has finished
    it. `close` adds the sums over the ranks, rounds them once into `.grad` and frees the buffers.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        self._open = False
        self._parameters = list(parameters)
        for parameter in self._parameters:
            if parameter.requires_grad and parameter.dtype in LOW_PRECISION:
                parameter.register_post_accumulate_grad_hook(self._collect)

    def open(self) -> None:
        self._sums.clear()
        self._open = True

    def drop(self) -> None:
        """Discards the open window's gradients."""
        self._open = False
        self._sums.clear()

    def close(self, ranks: Ranks) -> None:
        self._open = False
        for parameter in self._parameters if ranks.size > 1 else ():
            if not parameter.requires_grad:
                continue
            total = self._sums.get(parameter, parameter.grad)
            if total is None:  # unused on this rank, possibly used on another
                low = parameter.dtype in LOW_PRECISION
                total = torch.zeros_like(parameter, dtype=torch.float32 if low else None)
            self._sums[parameter] = ranks.sum(total)
        for parameter, total in self._sums.items():
            parameter.grad = total.to(parameter.dtype)
        self._sums.clear()

    def _collect(self, parameter: Tensor) -> None:
        if not self._open or parameter.grad is None:
            return
        if parameter in self._sums:
            self._sums[parameter].add_(parameter.grad)
        else:
            self._sums[parameter] = parameter.grad.float()
        parameter.grad = None
