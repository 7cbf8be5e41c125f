"""The embedded digits as data of several tasks, and of several views."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ..config.ranges import require
from .digits import Digits
from .in_memory import InMemory
from .transforms import keyed_uniforms

IGNORED = -100
SEED = 2024


class DigitTasks(InMemory):
    """`Digits` with two labels, each known of a part of the samples only, the same part in every run.

    Samples: images as of `Digits`; a dict of labels int64, `digit` (0 to 9) and `parity` (0 or 1), -100 where
    not known.

    Args:
        digit, parity: fractions of the samples whose label is known; of the test samples all are.
    """

    def __init__(self, train: bool, image_size: int = 32, digit: float = 0.25, parity: float = 0.75) -> None:
        for name, fraction in (("digit", digit), ("parity", parity)):
            require(name, fraction, above=0, at_most=1)
        images, labels = Digits(train, image_size).tensors
        draws = keyed_uniforms(torch.arange(len(labels)), 2, SEED)
        labelled = (draws < torch.tensor([digit, parity])) | (not train)
        targets = {
            "digit": labels.where(labelled[:, 0], IGNORED),
            "parity": (labels % 2).where(labelled[:, 1], IGNORED),
        }
        super().__init__(images, targets)


@dataclass
class TwoViews:
    """Two views of an image, each turned, scaled and shifted at random.

    Shapes: images (n, 2, channels, height, width), of which the first is taken and the second replaced;
    draws (n, 8).

    Args:
        degrees: rotation, at most.
        scale: the size changes by a factor of at most 1 + `scale`, and at least 1 / (1 + `scale`).
        shift: at most, as a fraction of the image.
    """

    degrees: float = 20.0
    scale: float = 0.2
    shift: float = 0.15
    uniforms = 8

    def __post_init__(self) -> None:
        require("degrees", self.degrees, at_least=0, at_most=180)
        require("scale", self.scale, at_least=0)
        require("shift", self.shift, at_least=0, at_most=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        first = images[:, 0]
        views = [self.view(first, part) for part in draws.to(images.dtype).split(4, 1)]
        return torch.stack(views, 1)

    def view(self, images: Tensor, draws: Tensor) -> Tensor:
        """One view of each of `images` (n, channels, height, width) by `draws` (n, 4)."""
        turn, scale, down, right = (2 * draws - 1).unbind(1)
        angle = turn * math.radians(self.degrees)
        factor = (1 + self.scale) ** scale
        cosine, sine = angle.cos() * factor, angle.sin() * factor
        rows = [torch.stack([cosine, -sine, 2 * self.shift * right], 1)]
        rows += [torch.stack([sine, cosine, 2 * self.shift * down], 1)]
        grid = torch.nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


class DigitViews(TensorDataset):
    """`Digits`, each with a view of it that is the same in every run; `TwoViews` draws both views anew.

    Samples: images (2, 1, image_size, image_size) float32; labels int64.
    """

    def __init__(self, train: bool, image_size: int = 32) -> None:
        images, labels = Digits(train, image_size).tensors
        draws = keyed_uniforms(torch.arange(len(labels)), 4, SEED)
        super().__init__(torch.stack([images, TwoViews().view(images, draws)], 1), labels)
