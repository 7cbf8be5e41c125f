"""A multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU and optional dropout between them.

    Args:
        inputs: numbers in a sample.
        num_classes: number of outputs.
        hidden: widths of the hidden layers.
        dropout: probability of dropout after each hidden layer.

    Shapes: (n, ...) to (n, num_classes).
    """

    def __init__(
        self, inputs: int, num_classes: int, hidden: Sequence[int] = (128, 64), dropout: float = 0.0
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for width in hidden:
            if width < 1:
                raise ValueError(f"hidden={list(hidden)}: units in each layer, at least 1")
            layers += [nn.Linear(inputs, width), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, num_classes))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)
