"""Metrics that torchmetrics does not have in the form a window needs."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Accuracy(Metric):
    """The share of items whose most probable class is their target, over all items that are not ignored.

    What torchmetrics' MulticlassAccuracy with average="micro" says, to the bit. That one takes the items
    that are not ignored out of the batch, and waits for the device to tell how many there are.

    Shapes: outputs (n, classes, ...), targets (n, ...) of class indices.

    Args:
        ignore_index: a target that is no class, as `torch.nn.CrossEntropyLoss` has it.
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
