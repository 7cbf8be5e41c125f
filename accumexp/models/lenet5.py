"""LeNet-5, as in the tutorial."""

from __future__ import annotations

from torch import Tensor, nn


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al., Proc. IEEE 86, 1998) with ReLU, max pooling and convolutions without bias.

    Args:
        num_classes: number of outputs.
        channels: channels of the image.
        image_size: height and width of the image in pixels, at least 16; 32 in the original.

    Shapes: (n, channels, image_size, image_size) to (n, num_classes).

    Raises:
        ValueError: if `image_size` is below 16.
    """

    def __init__(self, num_classes: int = 10, channels: int = 1, image_size: int = 32) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"image_size={image_size} is too small for LeNet-5, at least 16")
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * side * side, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))
