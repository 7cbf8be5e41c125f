"""Four norms for models that were written with BatchNorm, and what each makes of a batch that is split.

`batch` takes its statistics from the samples of one forward, and so depends on how a batch is split; the
other three give every split the whole batch's gradient: `frozen` takes no statistics, `group` takes them
from one sample, `ghost` from groups of samples that are the same however the batch is split.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..accum import split_sizes

NORMS = ("batch", "frozen", "group", "ghost")


def matched_momentum(momentum: float, times: int) -> float:
    """The momentum of each of `times` updates of running statistics that together are one of `momentum`.

    An update with momentum m' is r <- (1 - m') r + m' s. After N of them r keeps the weight (1 - m')^N, and
    one update with momentum m leaves it 1 - m. So (1 - m')^N = 1 - m, or m' = 1 - (1 - m)^(1/N): whatever N,
    the statistics forget at the same pace per optimizer update. The weight m then lies on the statistics of
    the N micro-batches, m' (1 - m')^(N - k) on those of the k-th. The last, smaller window of an epoch has
    fewer micro-batches and moves them the less.

    Raises:
        ValueError: unless 0 <= momentum <= 1 and 1 <= times.
    """
    if not isinstance(momentum, int | float) or not 0 <= momentum <= 1:
        raise ValueError(f"momentum={momentum}: a number from 0 to 1, the share of an update")
    if times < 1:
        raise ValueError(f"times={times}: at least 1")
    return 1 - (1 - momentum) ** (1 / times)


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm by its running statistics, in training too: they never change, weight and bias are trained.

    For weights that were trained elsewhere. Until some are loaded the statistics are mean 0 and variance 1,
    and what is left is a scale and a shift. `training` is always false.

    Shapes: (n, channels, height, width) to the same.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__(num_features, eps)
        self.eval()

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Stays as it is: what trains the model around it must not start to move the statistics."""
        return super().train(False)


class GhostBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over groups of at most `ghost_size` samples (Hoffer et al. 2017, arXiv:1705.08741).

    n samples are cut into ceil(n / ghost_size) groups in their order, of sizes that differ by one at most,
    the larger ones first, which is how a window is cut into micro-batches. So micro-batches of `ghost_size`
    samples are groups themselves, and the large batch in one piece has the same groups. The running
    statistics take one group after the other, as torch does with one batch after the other.

    Args:
        ghost_size: samples in a group.
        momentum: of the running statistics, for each group.

    Shapes: (n, channels, height, width) to the same.

    Raises:
        ValueError: for a `ghost_size` below 1; in `forward` for a group of a single value a channel.
    """

    def __init__(self, num_features: int, ghost_size: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        if not isinstance(ghost_size, int) or ghost_size < 1:
            raise ValueError(f"ghost_size={ghost_size}: samples in a group of statistics, at least 1")
        super().__init__(num_features, eps, momentum)
        self.ghost_size = ghost_size

    def statistics_groups(self, samples: int) -> list[int]:
        """Sizes of the groups that a batch of `samples` is cut into; `accum.inequalities` asks for them."""
        return split_sizes(samples, -(-samples // self.ghost_size))

    def forward(self, input: Tensor) -> Tensor:
        sizes = self.statistics_groups(len(input)) if self.training else [len(input)]
        if len(sizes) == 1:
            return super().forward(input)
        if sizes[0] == sizes[-1]:
            return self._forward_alike(input, len(sizes))
        return torch.cat([super(GhostBatchNorm2d, self).forward(part) for part in input.split(sizes)])

    def _forward_alike(self, input: Tensor, groups: int) -> Tensor:
        """All groups at once: each group's channels are channels of their own, of ghost_size samples.

        With g groups of statistics s_1 ... s_g, one update after the other ends at
        (1 - m)^g r + sum_k m (1 - m)^(g - k) s_k.
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
            momentum=1.0,  # what comes back is the groups' own statistics
            eps=self.eps,
        )
        with torch.no_grad():
            kept = 1 - self.momentum
            later = torch.arange(groups - 1, -1, -1, device=input.device, dtype=means.dtype)
            shares = self.momentum * kept**later
            for running, own in ((self.running_mean, means), (self.running_var, variances)):
                running.mul_(kept**groups).add_(shares @ own.view(groups, channels))
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
    """The norm for a number of channels, as one of `NORMS`.

    Args:
        momentum: of running statistics for each optimizer update, whatever its window is cut into.
        groups: of channels, for `group`; all channels where there are fewer.
        ghost_size: samples in a group of `ghost`; a micro-batch if None.
        window_steps: micro-batches in a window, on each rank.
        micro_batch_size: samples in each; needed by `ghost`, and `ghost_size` stands in for it.

    Raises:
        ValueError: for an unknown norm or a value out of range; from what is returned, for `groups` that do
            not divide the channels.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm}: one of {', '.join(NORMS)}")
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups={groups}: of channels, at least 1")
    each = matched_momentum(momentum, window_steps)
    if norm == "batch":
        return lambda channels: nn.BatchNorm2d(channels, momentum=each)
    if norm == "frozen":
        return FrozenBatchNorm2d
    if norm == "group":
        return lambda channels: _group_norm(groups, channels)
    ghost = micro_batch_size if ghost_size is None else ghost_size
    if not isinstance(ghost, int) or ghost < 1:
        raise ValueError(f"ghost_size={ghost}: samples in a group of statistics, at least 1")
    # Groups of this rank in an update: as many as its micro-batches are cut into.
    each = matched_momentum(momentum, window_steps * -(-(micro_batch_size or ghost) // ghost))
    return lambda channels: GhostBatchNorm2d(channels, ghost, momentum=each)


def _group_norm(groups: int, channels: int) -> nn.GroupNorm:
    fewer = min(groups, channels)
    if channels % fewer:
        raise ValueError(f"groups={groups}: does not divide {channels} channels")
    return nn.GroupNorm(fewer, channels)
