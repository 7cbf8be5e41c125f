"""The denominators of a window's losses, counted before its first backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .batch import Nested
from .loss import WindowLoss
from .memory import is_out_of_memory
from .sync import Sync


class Denominators:
    """The weights that the micro-batches' sums are divided by, counted over all ranks.

    On several ranks the all-reduce of the counts overlaps with the first forward.

    Args:
        targets: of this rank, one entry for each denominator, the window's or each micro-batch's: the
            batches that it is counted over.
        weight: the window's weight over all ranks if the caller knows it; it is then not counted.
    """

    def __init__(
        self,
        loss: WindowLoss,
        sync: Sync,
        targets: Sequence[Sequence[Nested]],
        weight: float | None = None,
    ) -> None:
        self.counts: bool = getattr(loss, "counts", True)
        self._wait: Callable[[], None] | None = None
        self._weights: list[Tensor | float]
        if weight is not None:
            self._weights = [weight]
        elif sync.ranks.size == 1 or not self.counts:
            self._weights = [self._count(loss, parts) for parts in targets]
        else:
            device = next(sync.module.parameters()).device
            try:
                counted = torch.stack([as_number(self._count(loss, parts), device) for parts in targets])
            except Exception as error:
                if is_out_of_memory(error):  # the other ranks' all-reduce waits for this one
                    sync.ranks.sum(torch.zeros(len(targets), dtype=torch.float64, device=device))
                raise
            self._weights = list(counted.unbind())
            self._wait = sync.ranks.sum_soon(counted)

    def _count(self, loss: WindowLoss, parts: Sequence[Nested]) -> Tensor | float:
        if not self.counts:  # a constant, whatever the number of parts
            return loss.weight(parts[0])
        weights = [loss.weight(part) for part in parts]
        return sum(weights[1:], weights[0])

    def wait(self) -> None:
        """Waits for the all-reduce, if one is pending."""
        if self._wait is not None:
            self._wait()
            self._wait = None

    def of(self, k: int) -> Tensor | float:
        """The denominator of micro-batch `k`."""
        self.wait()
        return self._weights[k if len(self._weights) > 1 else 0]

    @property
    def total(self) -> Tensor | float:
        """The window's weight."""
        if not self.counts:
            return self._weights[0]
        return sum(self._weights[1:], self._weights[0])


def reciprocal_of(weight: Tensor | float, like: Tensor) -> Tensor:
    """1 / `weight`, shape (), in the dtype and on the device of `like`; 1 if the weight is 0."""
    if not isinstance(weight, Tensor):
        return like.new_full((), 1 / (weight or 1.0))
    if weight.is_floating_point():
        return torch.where(weight == 0, 1.0, weight).to(like.dtype).reciprocal()
    return weight.clamp(min=1).to(like.dtype).reciprocal()


def as_number(weight: Tensor | float, device: torch.device) -> Tensor:
    """`weight` in fp64, shape (), without a copy that the host waits for."""
    if isinstance(weight, Tensor):
        return weight.detach().to(device, torch.float64).reshape(())
    return torch.full((), weight, dtype=torch.float64, device=device)
