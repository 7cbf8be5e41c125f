"""torchvision's ResNets with random weights and a choice of norms."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .norms import norm_layer


def _resnet(name: str) -> Callable[..., nn.Module]:
    """The function that makes torchvision's model `name`."""

    def resnet(
        num_classes: int = 1000,
        channels: int = 3,
        norm: str = "batch",
        momentum: float = 0.1,
        groups: int = 32,
        ghost_size: int | None = None,
        window_steps: int = 1,
        micro_batch_size: int | None = None,
    ) -> nn.Module:
        """torchvision's ResNet of this name (He et al. 2016, arXiv:1512.03385).

        ResNet-50 has its strides in the 3x3 convolutions, as in torchvision.

        Args:
            num_classes: number of outputs.
            channels: channels of the image.
            norm, momentum, groups, ghost_size: see `norms.norm_layer`.
            window_steps, micro_batch_size: the split of an update's batch; from `accum` by default.

        Shapes: (n, channels, height, width) to (n, num_classes).

        Raises:
            ValueError: with the name of the argument that is out of range.
        """
        from torchvision import models  # slower to import than torch

        layer = norm_layer(
            norm,
            momentum=momentum,
            groups=groups,
            ghost_size=ghost_size,
            window_steps=window_steps,
            micro_batch_size=micro_batch_size,
        )
        model = getattr(models, name)(weights=None, num_classes=num_classes, norm_layer=layer)
        if channels != 3:
            width = model.conv1.out_channels
            model.conv1 = nn.Conv2d(channels, width, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        return model

    resnet.__name__ = resnet.__qualname__ = name
    return resnet


resnet18 = _resnet("resnet18")
resnet50 = _resnet("resnet50")
