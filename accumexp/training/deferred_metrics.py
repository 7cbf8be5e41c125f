"""Losses and overflows that stay on the device until they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..accum import Window
from ..errors import TrainingError

# Consecutive windows that may overflow at the smallest loss scale before the run fails.
MOST_OVERFLOWS = 10
# Losses in one tensor.
BLOCK = 128


# Learning rates by the keys they are logged under.
Rates = Mapping[str, float | Tensor]


class _Pending(NamedTuple):
    update: int
    overflow: Tensor | None
    rates: Rates


@dataclass(frozen=True)
class MetricsRead:
    """Values by update, the newest of the loss scale, and the error that ends the run."""

    rows: list[tuple[int, dict[str, float]]]
    scaling: dict[str, float]
    trouble: TrainingError | None


class DeferredMetrics:
    """Keeps the results of updates on the device until `read`, which waits for it once.

    Args:
        window: whose ranks' parts of a loss are added, and whose loss scale is watched.
        check_finite: fail on a loss that is inf or nan, unless its window was skipped.
    """

    def __init__(self, window: Window, check_finite: bool) -> None:
        self.window = window
        self.check_finite = check_finite
        self._pending: list[_Pending] = []
        # The losses are in a few tensors that stay. A small tensor allocated in every update would fragment
        # the heap: activations would then get other addresses, not in the cache, every time.
        self._losses: list[Tensor] = []
        self._slots: list[Tensor] = []

    def add(self, update: int, loss: Tensor, overflow: Tensor | None, rates: Rates) -> None:
        """Adds an update: this rank's part of the loss, whether it was skipped, the learning rates."""
        if len(self._pending) == len(self._slots):
            block = torch.zeros(BLOCK, dtype=torch.float64, device=loss.device)
            self._losses.append(block)
            self._slots.extend(block.unbind())
        self._slots[len(self._pending)].copy_(loss)
        self._pending.append(_Pending(update, overflow, rates))

    def read(self) -> MetricsRead:
        """All updates added since the last call. Waits for the device."""
        pending, self._pending = self._pending, []
        if not pending:
            return MetricsRead([], {}, None)
        scale = self.window.loss_scale
        losses = torch.cat(self._losses)[: len(pending)]
        results = [self.window.sync.ranks.sum(losses)]
        if scale is not None:
            results.append(
                torch.stack([one.overflow for one in pending if one.overflow is not None]).double()
            )
            results.append(scale.counters())
        numbers = torch.cat(results).tolist()
        rows, trouble = [], None
        for k, one in enumerate(pending):
            skipped = scale is not None and bool(numbers[len(pending) + k])
            if self.check_finite and not skipped and not math.isfinite(numbers[k]):
                trouble = TrainingError(
                    f"train/loss is {numbers[k]} at update {one.update}: lower optimizer.lr, set "
                    "trainer.clip_norm, or go on regardless with trainer.check_finite=false"
                )
                break
            rows.append(
                (
                    one.update,
                    {"train/loss": numbers[k], **{key: float(rate) for key, rate in one.rates.items()}},
                )
            )
        if scale is None:
            return MetricsRead(rows, {}, trouble)
        size, skips, consecutive = numbers[-3:]
        if consecutive >= MOST_OVERFLOWS:
            trouble = hopeless(size, skips, pending[-1].update)
        return MetricsRead(rows, {"accum/loss_scale": size, "accum/skipped_windows": skips}, trouble)


def hopeless(scale: float, skipped: float, updates: int) -> TrainingError:
    """The error of a run whose windows all overflow."""
    return TrainingError(
        f"every window overflows: {skipped:.0f} of {updates} were skipped, the last at loss scale {scale:g}; "
        "look for inf or nan in the data and the forward pass, lower accum.init_scale (and accum.min_scale, "
        "the smallest it may become), or use precision=bf16 accum.loss_scale=none"
    )
