"""Loss scaling for fp16: a factor that keeps small gradients above fp16's smallest number.

The algorithm is that of Micikevicius et al., "Mixed Precision Training" (arXiv 1710.03740, 3.2), in its
dynamic form: an overflow skips the update and lowers the scale; a run of good updates raises it. Once
a window, never once a micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossScale:
    """The scale and its history, all on the device: nothing here waits for it.

    Args:
        init_scale: the first scale; a power of two changes no bit of a gradient.
        dynamic: False keeps the scale as it is, windows that overflow are skipped all the same.
        growth_factor: multiplies the scale after `growth_interval` updates without an overflow.
        backoff_factor: multiplies it after a window that overflowed.
        min_scale: the scale never falls below.

    Raises:
        ValueError: for a factor or interval that cannot work.
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

    def update(self, overflow: Tensor) -> None:
        """Ends a window: changes the scale once, by its flag (bool of shape ()).

        `good` counts updates since the last change of the scale, `skipped` all windows that overflowed,
        `in_vain` those since the last good one that did at the smallest scale.
        """
        at_the_end = overflow & (self.scale <= self.min_scale)
        # In place: a recorded step finds them where they were.
        self.in_vain.copy_(torch.where(overflow, self.in_vain + at_the_end, 0))
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
        """(scale, skipped, in_vain) as float64 of shape (3,), to be read together."""
        return torch.stack([self.scale.double(), self.skipped.double(), self.in_vain.double()])

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).to("cpu", copy=True) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            getattr(self, name).copy_(state[name])


_STATE = ("scale", "good", "skipped", "in_vain")
