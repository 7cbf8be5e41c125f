"""Where a window cannot equal the larger batch, told by module and reason."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm


@dataclass(frozen=True)
class Inequality:
    """One source of true inequality: `module` is its dotted name, `kind` its class, `reason` a phrase."""

    module: str
    kind: str
    reason: str


def inequalities(model: nn.Module, samples: int, steps: int) -> list[Inequality]:
    """Modules of `model` whose training depends on how `samples` are split into `steps` micro-batches.

    Finds what a module's type tells: batch statistics and random draws. It cannot see a loss or a
    forward function that couples samples. Empty for `steps=1`, which is the larger batch.
    """
    if steps == 1:
        return []
    micro = -(-samples // steps)
    found = []
    for name, module in model.named_modules():
        reason = _reason(module, micro, samples)
        if reason:
            found.append(Inequality(name or "(model)", type(module).__name__, reason))
    return found


def _reason(module: nn.Module, micro: int, samples: int) -> str | None:
    if not module.training:
        return None
    if isinstance(module, _BatchNorm):
        return f"batch statistics over {micro} of {samples} samples"
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
