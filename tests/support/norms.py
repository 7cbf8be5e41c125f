"""A model with a norm whose statistics are of some training, and samples that are unlike each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from accumexp.models import norm_layer

BATCH, STEPS, MICRO = 128, 4, 32
M = 0.1
CLASSES = 5


def normed(norm: str, ghost_size: int | None = None, steps: int = STEPS) -> nn.Sequential:
    """Two convolutions, each with `norm` for windows of `BATCH` samples, with statistics of some training."""
    torch.manual_seed(5)
    micro = -(-BATCH // steps)
    options: Any = {"ghost_size": ghost_size, "window_steps": steps, "micro_batch_size": micro}
    layer = norm_layer(norm, momentum=M, groups=2, **options)
    model = nn.Sequential(
        # Without biases, of which a norm leaves nothing: their gradients are 0 but for rounding.
        *(nn.Conv2d(2, 6, 3, bias=False), layer(6), nn.ReLU()),
        *(nn.Conv2d(6, 4, 3, bias=False), layer(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)),
    ).double()
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith(("1.", "4.")) and values.is_floating_point():
            values.data.uniform_(0.5, 1.5)
    return model


def images(samples: int) -> tuple[Tensor, Tensor]:
    """Samples that are unlike each other, the later ones brighter: groups differ in mean and variance."""
    generator = torch.Generator().manual_seed(samples)
    inputs = torch.randn(samples, 2, 8, 8, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.5, 2, samples, dtype=torch.float64)[:, None, None, None]
    return inputs * scale + scale, torch.randint(0, CLASSES, (samples,), generator=generator)


def floats(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in buffers.items() if value.is_floating_point()}
