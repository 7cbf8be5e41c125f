"""ResNets of torchvision, without weights, with the norm that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .norms import norm_layer


def resnet18(
    num_classes: int = 1000,
    channels: int = 3,
    norm: str = "batch",
    momentum: float = 0.1,
    groups: int = 32,
    ghost_size: int | None = None,
    window_steps: int = 1,
    micro_batch_size: int | None = None,
) -> nn.Module:
    """ResNet-18 (He et al. 2016, arXiv:1512.03385).

    Args:
        num_classes: number of outputs.
        channels: of the image.
        norm, momentum, groups, ghost_size: see `norms.norm_layer`.
        window_steps, micro_batch_size: how an update's batch is cut, from `accum` if not given.

    Shapes: (n, channels, height, width) to (n, num_classes).

    Raises:
        ValueError: naming the argument that cannot be.
    """
    from torchvision.models import resnet18  # takes longer to import than torch

    layer = norm_layer(
        norm,
        momentum=momentum,
        groups=groups,
        ghost_size=ghost_size,
        window_steps=window_steps,
        micro_batch_size=micro_batch_size,
    )
    return _built(resnet18, num_classes, channels, layer)


def resnet50(
    num_classes: int = 1000,
    channels: int = 3,
    norm: str = "batch",
    momentum: float = 0.1,
    groups: int = 32,
    ghost_size: int | None = None,
    window_steps: int = 1,
    micro_batch_size: int | None = None,
) -> nn.Module:
    """ResNet-50 with the stride in the 3x3 convolutions, as torchvision has it; arguments of `resnet18`."""
    from torchvision.models import resnet50

    layer = norm_layer(
        norm,
        momentum=momentum,
        groups=groups,
        ghost_size=ghost_size,
        window_steps=window_steps,
        micro_batch_size=micro_batch_size,
    )
    return _built(resnet50, num_classes, channels, layer)


def _built(
    make: Callable[..., Any], num_classes: int, channels: int, layer: Callable[[int], nn.Module]
) -> nn.Module:
    model = make(weights=None, num_classes=num_classes, norm_layer=layer)
    if channels != 3:
        first = model.conv1
        model.conv1 = nn.Conv2d(
            channels, first.out_channels, first.kernel_size, first.stride, first.padding, bias=False
        )
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return model
