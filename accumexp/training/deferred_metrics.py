"""Losses and overflows that the device has computed and the host has not read yet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..accum import Window
from ..errors import TrainingError

# Windows that may overflow one after the other at the smallest loss scale before the run is given up.
IN_VAIN = 10
# Losses that room is made for at once.
AT_ONCE = 128


class _Pending(NamedTuple):
    update: int
    overflow: Tensor | None
    rate: float | Tensor


@dataclass(frozen=True)
class MetricsRead:
    """What was read: values by update, the newest of the loss scale, and why the run cannot go on."""

    rows: list[tuple[int, dict[str, float]]]
    scaling: dict[str, float]
    trouble: TrainingError | None


class DeferredMetrics:
    """Keeps an update's results on the device until `read`, which waits for it once for all of them.

    Args:
        window: whose ranks' parts of a loss are added, and whose loss scale is watched.
        check_finite: fail on a loss that is inf or nan, unless its window was skipped.
    """

    def __init__(self, window: Window, check_finite: bool) -> None:
        self.window = window
        self.check_finite = check_finite
        self._pending: list[_Pending] = []
        # The losses lie in a few tensors that stay. A small one kept from every update would lie between the
        # large ones that come and go, and the C library would give those other, colder memory every time.
        self._losses: list[Tensor] = []
        self._places: list[Tensor] = []

    def add(self, update: int, loss: Tensor, overflow: Tensor | None, rate: float | Tensor) -> None:
        """Takes this rank's part of the loss, whether the window was skipped, and its learning rate."""
        if len(self._pending) == len(self._places):
            more = torch.zeros(AT_ONCE, dtype=torch.float64, device=loss.device)
            self._losses.append(more)
            self._places.extend(more.unbind())
        self._places[len(self._pending)].copy_(loss)
        self._pending.append(_Pending(update, overflow, rate))

    def read(self) -> MetricsRead:
        """All that was added since the last call. Waits for the device."""
        pending, self._pending = self._pending, []
        if not pending:
            return MetricsRead([], {}, None)
        scale = self.window.loss_scale
        losses = torch.cat(self._losses)[: len(pending)]
        found = [self.window.sync.ranks.sum(losses)]
        if scale is not None:
            found.append(torch.stack([one.overflow for one in pending if one.overflow is not None]).double())
            found.append(scale.counters())
        numbers = torch.cat(found).tolist()
        rows, trouble = [], None
        for k, one in enumerate(pending):
            skipped = scale is not None and bool(numbers[len(pending) + k])
            if self.check_finite and not skipped and not math.isfinite(numbers[k]):
                trouble = TrainingError(
                    f"train/loss is {numbers[k]} at update {one.update}: lower optimizer.lr, set "
                    "trainer.clip_norm, or go on regardless with trainer.check_finite=false"
                )
                break
            rows.append((one.update, {"train/loss": numbers[k], "train/lr": float(one.rate)}))
        if scale is None:
            return MetricsRead(rows, {}, trouble)
        size, skips, in_vain = numbers[-3:]
        if in_vain >= IN_VAIN:
            trouble = hopeless(size, skips, pending[-1].update)
        return MetricsRead(rows, {"accum/loss_scale": size, "accum/skipped_windows": skips}, trouble)


def hopeless(scale: float, skipped: float, updates: int) -> TrainingError:
    """What to say of a run that does nothing but overflow."""
    return TrainingError(
        f"every window overflows: {skipped:.0f} of {updates} were skipped, the last at loss scale {scale:g}; "
        "look for inf or nan in the data and the forward pass, lower accum.init_scale (and accum.min_scale, "
        "the smallest it may become), or use precision=bf16 accum.loss_scale=none"
    )
