"""The embedded data set: real handwritten digits, shipped with scikit-learn."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from ..environment.console import amount
from ..environment.memory import free_bytes
from ..errors import UsageError

TEST_SAMPLES = 360


class Digits(TensorDataset):
    """1,797 handwritten digits of 8x8 pixels, resized and normalised: 1,437 to train on, 360 to test.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998, as
    `sklearn.datasets.load_digits`. The test samples are the same in every run.

    Samples: images (1, image_size, image_size) float32 of about zero mean and unit variance; labels int64.
    """

    def __init__(self, train: bool, image_size: int = 32) -> None:
        pixels, labels = _table()
        images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
        needed, free = 3 * 4 * len(images) * image_size**2, free_bytes(torch.device("cpu"))
        if needed > free:  # before the system ends the process for it
            raise UsageError(f"image_size={image_size}: needs {amount(needed)}, {amount(free)} are free")
        if image_size != 8:
            images = torch.nn.functional.interpolate(images, size=image_size, mode="bilinear")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1998))
        indices = order[TEST_SAMPLES:] if train else order[:TEST_SAMPLES]
        super().__init__((images[indices] - 0.305) / 0.376, torch.from_numpy(labels)[indices].long())


@cache
def _table() -> tuple[Any, Any]:
    """Pixels from 0 to 16, (1797, 64), and labels, without importing scikit-learn, which takes seconds.

    The arrays are shared by all calls.
    """
    package = importlib.util.find_spec("sklearn")
    for folder in package.submodule_search_locations or () if package else ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            table = np.loadtxt(path, delimiter=",")
            return table[:, :-1].copy(), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return bunch.data, bunch.target
