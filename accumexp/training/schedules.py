"""Learning rate schedules over updates, and the optimizers of which torch has fused kernels.

A schedule is stepped once an update, so its length does not depend on `accum.steps`. Each multiplies the
optimizer's learning rates by a factor; `total_updates` is the number of updates in the run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from ..config.ranges import require


def constant(optimizer: Optimizer) -> LRScheduler:
    """Factor 1."""
    return _Constant(optimizer)


class _Constant(LRScheduler):
    """The optimizer's learning rates unchanged; cheaper than `LambdaLR` in every update."""

    def get_lr(self) -> list[float | Tensor]:
        return list(self.base_lrs)

    def get_last_lr(self) -> list[float | Tensor]:
        return self.get_lr()

    def step(self, epoch: int | None = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        for group, rate in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def cosine(optimizer: Optimizer, total_updates: int, min_factor: float = 0.0) -> LambdaLR:
    """Factor 1 to `min_factor` along half a cosine (Loshchilov and Hutter, arXiv 1608.03983, eq. 5)."""
    return warmup_cosine(optimizer, total_updates, warmup_updates=0, min_factor=min_factor)


def warmup_cosine(
    optimizer: Optimizer, total_updates: int, warmup_updates: int, min_factor: float = 0.0
) -> LambdaLR:
    """Linear from 1 / `warmup_updates` to 1 (Goyal et al., arXiv 1706.02677, 2.2), then `cosine`.

    Raises:
        ValueError: if the warm-up is negative or as long as the run, or `min_factor` is not in [0, 1].
    """
    require("min_factor", min_factor, at_least=0, at_most=1)
    if not 0 <= warmup_updates < total_updates:
        raise ValueError(f"warmup_updates={warmup_updates} of {total_updates} updates in the run")

    def factor(update: int) -> float:
        if update < warmup_updates:
            return (update + 1) / warmup_updates
        # The last update, total_updates - 1, has min_factor itself.
        done = (update - warmup_updates) / max(1, total_updates - 1 - warmup_updates)
        return min_factor + (1 - min_factor) * (1 + math.cos(math.pi * min(1.0, done))) / 2

    return LambdaLR(optimizer, factor)


def step_schedule(scheduler: Any, first: bool) -> None:
    """Steps `scheduler` after an update; the `first` may have been skipped, with no step of the optimizer."""
    if not first:
        scheduler.step()
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        scheduler.step()


IMPLEMENTATIONS = ("fused", "foreach", "capturable", "differentiable")
FUSED_ON = {
    "torch.optim.SGD": ("cpu", "cuda"),
    "torch.optim.Adam": ("cpu", "cuda"),
    "torch.optim.AdamW": ("cpu", "cuda"),
    "torch.optim.Adagrad": ("cpu",),
}


def may_be_fused(
    node: Mapping[str, Any], parameters: Iterable[Tensor], modules: Iterable[nn.Module] = ()
) -> bool:
    """Whether the optimizer of `node` has a fused kernel for `parameters`, and `node` chooses no other one.

    Not for shards, for parameters with gaps between their elements, or for sparse gradients: the kernels
    refuse them or, on a CPU, write into the gaps.

    A fused kernel makes an update in one pass over the memory, and on a GPU in one launch; its rounding
    differs from that of the loop over parameters.
    """
    devices = FUSED_ON.get(str(node.get("_target_")), ())
    if not devices or any(name in node for name in IMPLEMENTATIONS):
        return False
    if node.get("momentum") and node.get("dampening"):  # a fused first step would ignore it
        return False
    if any(getattr(module, "sparse", False) for module in modules):
        return False
    return all(
        p.device.type in devices
        and p.is_floating_point()
        and p.dtype is not torch.float16
        and not hasattr(p, "to_local")
        and (p.is_contiguous() or p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))
        for p in parameters
    )
