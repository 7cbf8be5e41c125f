"""The embedded data set: real handwritten digits that come with scikit-learn."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

TEST_SAMPLES = 360


class Digits(TensorDataset):
    """1,797 handwritten digits of 8x8 pixels, resized and normalised: 1,437 to train on, 360 to test.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998, as
    `sklearn.datasets.load_digits`. Which samples are the test's is fixed.

    Samples: images (1, image_size, image_size) float32 of about zero mean and unit variance; labels int64.
    """

    def __init__(self, train: bool, image_size: int = 32) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
        if image_size != 8:
            images = torch.nn.functional.interpolate(images, size=image_size, mode="bilinear")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1998))
        chosen = order[TEST_SAMPLES:] if train else order[:TEST_SAMPLES]
        super().__init__((images[chosen] - 0.305) / 0.376, torch.from_numpy(labels)[chosen].long())
