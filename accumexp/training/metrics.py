"""Metrics that never wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Accuracy(Metric):
    """The fraction of items whose most probable class is their target; ignored items do not count.

    Equals torchmetrics' MulticlassAccuracy with average="micro" to the bit. That one selects the items
    that are not ignored, which waits for the device to count them.

    Shapes: outputs (n, classes, ...), targets (n, ...) of class indices.

    Args:
        ignore_index: the target of ignored items, as in `torch.nn.CrossEntropyLoss`.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    correct: Tensor
    total: Tensor

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        valid = targets != self.ignore_index
        self.correct += ((outputs.argmax(1) == targets) & valid).sum()
        self.total += valid.sum()

    def compute(self) -> Tensor:
        """Shape (); 0 where every target was ignored."""
        return self.correct / self.total.clamp(min=1)
