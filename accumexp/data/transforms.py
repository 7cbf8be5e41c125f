"""Transforms of images: fixed ones, and random augmentations that are drawn again each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..config.ranges import require


class Scale:
    """Converts uint8 images (..., channels, height, width) to float32: `(x / 255 - mean) / std`."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        return (image.as_subclass(Tensor).float() / 255 - self.mean) / self.std


@runtime_checkable
class BatchAugment(Protocol):
    """A random transform of a whole batch on its device.

    The draws are a function of the run's seed, the epoch and the sample's index, so that a sample's
    augmentation does not depend on its batch or micro-batch.
    """

    uniforms: int  # draws for a sample

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augments `images` (n, ...) by `draws` (n, uniforms), uniform in [0, 1)."""
        ...


@dataclass
class ShiftAndFlip:
    """Shifts by up to `shift` pixels each way, padding with zeros, and flips half of the images.

    Shapes: images (n, channels, height, width), draws (n, 3).
    """

    shift: int = 4
    flip: bool = True
    uniforms = 3

    def __post_init__(self) -> None:
        require("shift", self.shift, at_least=0, at_most=16384, whole=True)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        n, channels, height, width = images.shape
        offsets = (draws[:, :2] * (2 * self.shift + 1)).long()
        rows = offsets[:, :1] + torch.arange(height, device=images.device)
        columns = offsets[:, 1:] + torch.arange(width, device=images.device)
        if self.flip:
            columns = torch.where(draws[:, 2:] < 0.5, columns, columns.flip(1))
        padded = torch.nn.functional.pad(images, [self.shift] * 4)
        sample = torch.arange(n, device=images.device).view(n, 1, 1, 1)
        channel = torch.arange(channels, device=images.device).view(1, channels, 1, 1)
        return padded[sample, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


def keyed_uniforms(indices: Tensor, count: int, seed: int) -> Tensor:
    """`count` uniform numbers in [0, 1) for each of `indices` (n,), a function of index and seed alone.

    The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) over a counter, with 24 bits a number.

    Returns:
        float32 on the indices' device, shape (n, count).
    """
    counter = indices.view(-1, 1) * count + torch.arange(count, device=indices.device) + 1
    state = counter * _signed(0x9E3779B97F4A7C15) + _signed(seed)
    state = (state ^ _shifted(state, 30)) * _signed(0xBF58476D1CE4E5B9)
    state = (state ^ _shifted(state, 27)) * _signed(0x94D049BB133111EB)
    state = state ^ _shifted(state, 31)
    return _shifted(state, 40).float() / 2**24


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64; torch's is arithmetic."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
