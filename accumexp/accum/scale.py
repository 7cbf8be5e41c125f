"""Dynamic loss scaling for fp16 (Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, 3.2).

An overflow skips the update and lowers the scale; a series of updates without overflow raises it. The scale
changes at most once a window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossScale:
    """The scale and its counters, all on the device: no method waits for it, but for `state_dict`.

    Args:
        init_scale: the initial scale; scaling by a power of two is exact.
        dynamic: whether the scale changes; windows that overflow are skipped in any case.
        growth_factor: multiplies the scale after `growth_interval` updates without an overflow.
        backoff_factor: multiplies the scale after a window that overflowed.
        min_scale: the smallest scale.

    Attributes:
        scale: shape (), fp32.
        good: updates since the last change of the scale or overflow.
        skipped: windows that overflowed.
        in_vain: windows that overflowed at the smallest scale since the last one without overflow.
        in_a_row: windows that overflowed at any scale since the last one without overflow.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        *,
        dynamic: bool = True,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        min_scale: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale={init_scale}: above 0")
        if not growth_factor > 1 or not 0 < backoff_factor < 1:
            raise ValueError(
                f"growth_factor={growth_factor} and backoff_factor={backoff_factor}: above, below 1"
            )
        if growth_interval < 1:
            raise ValueError(f"growth_interval={growth_interval}: at least 1 update")
        if dynamic and not 0 < min_scale <= init_scale:
            raise ValueError(f"min_scale={min_scale}: above 0 and at most init_scale={init_scale}")
        self.dynamic = dynamic
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = growth_interval
        self.min_scale = min_scale if dynamic else init_scale
        self.scale = torch.full((), init_scale, dtype=torch.float32, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros_like(self.good)
        self.in_vain = torch.zeros_like(self.good)
        self.in_a_row = torch.zeros_like(self.good)

    def update(self, overflow: Tensor) -> None:
        """Updates the scale and the counters after a window; `overflow` is a bool of shape ()."""
        at_min_scale = overflow & (self.scale <= self.min_scale)
        # In place, because a recorded step works on these addresses.
        self.in_vain.copy_(torch.where(overflow, self.in_vain + at_min_scale, 0))
        self.in_a_row.copy_(torch.where(overflow, self.in_a_row + 1, 0))
        self.skipped.add_(overflow)
        if not self.dynamic:
            return
        good = torch.where(overflow, 0, self.good + 1)
        grows = good >= self.growth_interval
        raised = self.scale * self.growth_factor
        lowered = (self.scale * self.backoff_factor).clamp(min=self.min_scale)
        kept = torch.where(overflow, lowered, self.scale)
        self.scale.copy_(torch.where(grows & raised.isfinite(), raised, kept))
        self.good.copy_(torch.where(grows, 0, good))

    def counters(self) -> Tensor:
        """(scale, skipped, in_vain, in_a_row) in fp64, shape (4,), which can be read in one transfer."""
        return torch.stack(
            [each.double() for each in (self.scale, self.skipped, self.in_vain, self.in_a_row)]
        )

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).to("cpu", copy=True) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            if name in state:  # that of an earlier version has no `in_a_row`
                getattr(self, name).copy_(state[name])


_STATE = ("scale", "good", "skipped", "in_vain", "in_a_row")
