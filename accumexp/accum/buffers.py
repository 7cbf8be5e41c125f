"""fp32 accumulation for parameters of lower precision, at the cost of an fp32 buffer for each of them.

Adding N bf16 gradients in bf16 loses up to N/2 units in the last of 8 bits; adding them in fp32 and rounding
once loses half a unit at any N.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .sync import Sync

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Fp32Buffers:
    """Accumulates the gradients of low-precision parameters in fp32 while a window is open.

    A hook moves each micro-batch's gradient from `.grad` into the buffer as soon as autograd has finished
    it. `close` adds the sums over the ranks, rounds them once into `.grad` and frees the buffers.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._sums: dict[Tensor, Tensor] | None = None  # None while no window is open
        self._parameters = list(parameters)
        for parameter in self._parameters:
            if parameter.requires_grad and parameter.dtype in LOW_PRECISION:
                parameter.register_post_accumulate_grad_hook(self._collect)

    def open(self) -> None:
        self._sums = {}

    def drop(self) -> None:
        """Discards the open window's gradients."""
        self._sums = None

    def close(self, sync: Sync) -> None:
        """Ends the window. On several ranks a parameter that none of them used has the gradient None."""
        sums, self._sums = self._sums or {}, None
        if sync.ranks.size > 1:
            trained = [parameter for parameter in self._parameters if parameter.requires_grad]
            unused = {trained[index] for index in sync.unused()} - sums.keys()
            used = sync.ranks.largest([parameter not in unused for parameter in trained])
            for parameter, anywhere in zip(trained, used, strict=True):
                if not anywhere:
                    parameter.grad = None
                    continue
                total = sums.get(parameter, parameter.grad)
                if total is None:
                    low = parameter.dtype in LOW_PRECISION
                    total = torch.zeros_like(parameter, dtype=torch.float32 if low else None)
                sums[parameter] = sync.ranks.sum(total)
        for parameter, total in sums.items():
            parameter.grad = total.to(parameter.dtype)

    def _collect(self, parameter: Tensor) -> None:
        if self._sums is None or parameter.grad is None:
            return
        if parameter in self._sums:
            self._sums[parameter].add_(parameter.grad)
        else:
            self._sums[parameter] = parameter.grad.float()
        parameter.grad = None
