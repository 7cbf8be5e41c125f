"""A network with several outputs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class Heads(nn.Module):
    """A trunk, ReLU, and a linear layer for each output.

    Args:
        trunk: gives (n, width).
        width: features that the trunk gives.
        heads: numbers of outputs by name.

    Shapes: those of the trunk's inputs to a dict of (n, outputs) by name.
    """

    def __init__(self, trunk: nn.Module, width: int, heads: Mapping[str, int]) -> None:
        super().__init__()
        if not heads:
            raise ValueError("heads: at least one is needed")
        self.trunk = trunk
        self.heads = nn.ModuleDict({name: nn.Linear(width, outputs) for name, outputs in heads.items()})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        features = self.trunk(inputs).relu()
        return {name: head(features) for name, head in self.heads.items()}
