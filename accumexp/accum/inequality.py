"""Modules because of which a window cannot equal the larger batch, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from .batch import split_sizes, steps_for
from .window_norm import WindowBatchNorm


@dataclass(frozen=True)
class Inequality:
    """A module that makes the window differ from the larger batch.

    Attributes:
        module: its dotted name.
        kind: its class.
        reason: a phrase that says why.
    """

    module: str
    kind: str
    reason: str


def inequalities(
    model: nn.Module, samples: int, steps: int, *, ranks: int = 1, last: int = 0
) -> list[Inequality]:
    """Modules of `model` whose training depends on how `samples` are split into micro-batches.

    Detects batch statistics and random draws by a module's type, but not a loss or a forward function that
    couples samples. Empty for one micro-batch, which is the larger batch.

    A BatchNorm with statistics over groups of samples declares their sizes with a method
    `statistics_groups(samples)`. It is reported only if the micro-batches have other groups than the batch.

    Args:
        samples: samples in an update, on all ranks.
        steps: micro-batches in its window, on each rank.
        ranks: number of ranks.
        last: samples in an epoch's last batch if it is smaller, else 0.
    """
    if steps * ranks == 1:
        return []
    batches = [(samples, steps)]
    if last:
        batches.append((last, steps_for(last, samples, steps)))
    splits = [_micro_batches(size, count, ranks) for size, count in batches]
    reasons = [(name, module, _reason(module, splits, ranks)) for name, module in model.named_modules()]
    return [Inequality(name or "(model)", type(module).__name__, why) for name, module, why in reasons if why]


def _micro_batches(samples: int, steps: int, ranks: int) -> list[int]:
    """Sizes of all ranks' micro-batches, split as by `rank_share`, in the order of the batch's samples."""
    sizes = split_sizes(samples, steps, empty=True)
    return [part for size in sizes for part in split_sizes(size, ranks, empty=True) if part]


def _reason(module: nn.Module, splits: list[list[int]], ranks: int) -> str | None:
    if not module.training:
        return None
    groups = getattr(module, "statistics_groups", None)
    if groups is not None:
        return _grouped(groups, splits, ranks)
    if isinstance(module, _BatchNorm) and not isinstance(module, WindowBatchNorm):
        return f"batch statistics over {max(splits[0])} of {sum(splits[0])} samples"
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return "running statistics updated once a micro-batch"
    draws = "random draws depend on the split"
    if isinstance(module, _DropoutNd) and module.p > 0:
        return draws
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention) and module.dropout > 0:
        return draws
    if isinstance(module, nn.RReLU) or type(module).__name__ in ("StochasticDepth", "DropPath"):
        return draws
    return None


def _grouped(groups: Callable[[int], list[int]], splits: list[list[int]], ranks: int) -> str | None:
    for sizes in splits:
        whole = sum(sizes)
        if [group for size in sizes for group in groups(size)] != groups(whole):
            return f"other groups of statistics in micro-batches of {max(sizes)} than in all {whole} samples"
    return "running statistics over the samples of one rank alone" if ranks > 1 else None
