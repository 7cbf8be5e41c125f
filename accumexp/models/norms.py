"""Norms for models that were written with BatchNorm.

The gradient of `batch` depends on how a batch is split into micro-batches. With the others it does not:
`frozen` has no statistics, those of `group` are over one sample, those of `ghost` over fixed groups, and
those of `window` over the whole batch, however it is split.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..accum import WindowBatchNorm2d, split_sizes

NORMS = ("batch", "frozen", "group", "ghost", "window")


def matched_momentum(momentum: float, times: int) -> float:
    """The momentum of `times` updates of running statistics that equal one update with `momentum` in decay.

    After N updates r <- (1 - m') r + m' s the first r has the weight (1 - m')^N, after one with momentum m
    the weight 1 - m. So m' = 1 - (1 - m)^(1/N). A smaller last window has fewer micro-batches and less decay.

    Raises:
        ValueError: unless 0 <= momentum <= 1 and 1 <= times.
    """
    if not isinstance(momentum, int | float) or not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum}: a number from 0 to 1, the share of an update")
    if times < 1:
        raise ValueError(f"times={times}: at least 1")
    return 1 - (1 - momentum) ** (1 / times)


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with fixed running statistics, in training too; weight and bias are trained.

    For pretrained weights; until they are loaded the statistics are mean 0 and variance 1. `training` is
    always False.

    Shapes: (n, channels, height, width) to the same.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self.eval()

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Has no effect, so that `model.train()` does not change the statistics."""
        return super().train(False)


class GhostBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over groups of at most `ghost_size` samples (Hoffer et al. 2017, arXiv:1705.08741).

    n samples are split into ceil(n / ghost_size) groups as a window is split into micro-batches, so that a
    micro-batch of `ghost_size` samples is one group. Each group updates the running statistics, in order.

    Args:
        num_features: channels.
        ghost_size: samples in a group.
        eps: added to the variance.
        momentum: of the running statistics, for each group.

    Shapes: (n, channels, height, width) to the same.

    Raises:
        ValueError: for a `ghost_size` below 1; in `forward` for a group with one value per channel.
    """

    def __init__(self, num_features: int, ghost_size: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        if not isinstance(ghost_size, int) or ghost_size < 1:
            raise ValueError(f"ghost_size={ghost_size}: samples in a group of statistics, at least 1")
        super().__init__(num_features, eps, momentum)
        self.ghost_size = ghost_size

    def statistics_groups(self, samples: int) -> list[int]:
        """The sizes of the groups of a batch of `samples`; used by `accum.inequalities`."""
        return split_sizes(samples, -(-samples // self.ghost_size))

    def forward(self, input: Tensor) -> Tensor:
        sizes = self.statistics_groups(len(input)) if self.training else [len(input)]
        if len(sizes) == 1:
            return super().forward(input)
        if sizes[0] == sizes[-1]:
            return self._forward_equal(input, len(sizes))
        return torch.cat([super(GhostBatchNorm2d, self).forward(part) for part in input.split(sizes)])

    def _forward_equal(self, input: Tensor, groups: int) -> Tensor:
        """The forward of groups of equal size, in one batch norm over groups * channels channels.

        The running statistics become (1 - m)^g r + sum_k m (1 - m)^(g - k) s_k, as by g updates.
        """
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        samples, channels, *area = input.shape
        size = samples // groups
        side_by_side = input.view(groups, size, channels, *area).transpose(0, 1)
        side_by_side = side_by_side.reshape(size, groups * channels, *area)
        means = self.running_mean.new_zeros(groups * channels)
        variances = torch.zeros_like(means)
        normed = F.batch_norm(
            side_by_side,
            means,
            variances,
            self.weight.repeat(groups),
            self.bias.repeat(groups),
            training=True,
            momentum=1.0,  # so that `means` and `variances` become the groups' statistics
            eps=self.eps,
        )
        with torch.no_grad():
            kept = 1 - self.momentum
            later = torch.arange(groups - 1, -1, -1, device=input.device, dtype=means.dtype)
            shares = self.momentum * kept**later
            for running, new in ((self.running_mean, means), (self.running_var, variances)):
                running.mul_(kept**groups).add_(shares @ new.view(groups, channels))
            self.num_batches_tracked.add_(groups)
        return normed.view(size, groups, channels, *area).transpose(0, 1).reshape(input.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ghost_size={self.ghost_size}"


def norm_layer(
    norm: str,
    *,
    momentum: float = 0.1,
    groups: int = 32,
    ghost_size: int | None = None,
    window_steps: int = 1,
    micro_batch_size: int | None = None,
) -> Callable[[int], nn.Module]:
    """A function that makes the norm for a number of channels.

    Args:
        norm: one of `NORMS`.
        momentum: of running statistics, for each optimizer update (`matched_momentum`).
        groups: groups of channels, for `group`; at most the number of channels.
        ghost_size: samples in a group of `ghost`, by default `micro_batch_size`.
        window_steps: micro-batches in a window, on each rank.
        micro_batch_size: samples in a micro-batch on each rank, for `ghost`; by default `ghost_size`.

    Raises:
        ValueError: for an unknown norm or a value out of range. The returned function raises it for `groups`
            that do not divide the channels.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm}: one of {', '.join(NORMS)}")
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups={groups}: of channels, at least 1")
    each = matched_momentum(momentum, window_steps)
    if norm == "window":
        return lambda channels: WindowBatchNorm2d(channels, momentum=momentum)
    if norm == "batch":
        return lambda channels: nn.BatchNorm2d(channels, momentum=each)
    if norm == "frozen":
        return FrozenBatchNorm2d
    if norm == "group":
        return partial(_group_norm, groups)
    ghost = micro_batch_size if ghost_size is None else ghost_size
    if not isinstance(ghost, int) or ghost < 1:
        raise ValueError(f"ghost_size={ghost}: samples in a group of statistics, at least 1")
    # The groups of this rank in an update: those of its micro-batches.
    each = matched_momentum(momentum, window_steps * -(-(micro_batch_size or ghost) // ghost))
    return lambda channels: GhostBatchNorm2d(channels, ghost, momentum=each)


def _group_norm(groups: int, channels: int) -> nn.GroupNorm:
    fewer = min(groups, channels)
    if channels % fewer:
        raise ValueError(f"groups={groups}: does not divide {channels} channels")
    return nn.GroupNorm(fewer, channels)
