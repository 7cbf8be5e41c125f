"""What a window's losses are divided by, known before its first backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .batch import Nested
from .memory import is_out_of_memory

if TYPE_CHECKING:
    from .window import Window


class Weights:
    """What each micro-batch's sum is divided by, counted over all ranks before the first backward.

    The count travels while the first forward computes.
    """

    def __init__(
        self, window: Window, targets: Nested, parts: list[Nested], known: float | None = None
    ) -> None:
        self.by_step = window.reduction == "sum"
        weighed = parts if self.by_step else [targets]
        self._own: list[Tensor | float] = []
        self._arrived: Callable[[], None] | None = None
        self.counts: bool = getattr(window.loss, "counts", True)
        if known is not None and not self.by_step:
            self._own = [known]
        elif window.sync.ranks.size == 1 or not self.counts:
            self._own = [window.loss.weight(part) for part in weighed]
        else:
            self._send(window, weighed)

    def _send(self, window: Window, weighed: list[Nested]) -> None:
        ranks, device = window.sync.ranks, next(window.model.parameters()).device
        try:
            counted = torch.stack([_exact(window.loss.weight(part), device) for part in weighed])
        except Exception as error:
            if is_out_of_memory(error):  # the others count already, and wait for this rank
                ranks.sum(torch.zeros(len(weighed), dtype=torch.float64, device=device))
            raise
        self._own = list(counted.unbind())
        self._arrived = ranks.sum_soon(counted)

    def arrive(self) -> None:
        """Waits for what is on its way."""
        if self._arrived is not None:
            self._arrived()
            self._arrived = None

    def of(self, k: int) -> Tensor | float:
        """The weight that micro-batch `k` is a part of: the window's, or its own for a sum of means."""
        self.arrive()
        return self._own[k if self.by_step else 0]

    @property
    def total(self) -> Tensor | float:
        """The window's weight."""
        if not self.counts:
            return self._own[0]
        return sum(self._own[1:], self._own[0])


def share_of(weight: Tensor | float, like: Tensor) -> Tensor:
    """1 / `weight`, shape (), of the dtype and device of `like`; 1 where the weight is 0.

    A window of ignored items has the gradient 0, not 0 / 0.
    """
    if not isinstance(weight, Tensor):
        return like.new_full((), 1 / (weight or 1.0))
    if weight.is_floating_point():
        return torch.where(weight == 0, 1.0, weight).to(like.dtype).reciprocal()
    return weight.clamp(min=1).to(like.dtype).reciprocal()


def _exact(weight: Tensor | float, device: torch.device) -> Tensor:
    """`weight` as fp64 of shape (), without a copy that the host would wait for."""
    if isinstance(weight, Tensor):
        return weight.to(device, torch.float64)
    return torch.full((), weight, dtype=torch.float64, device=device)
