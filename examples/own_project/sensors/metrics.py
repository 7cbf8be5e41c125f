"""A metric of torchmetrics' kind."""

import torch
from torch import Tensor
from torchmetrics import Metric

from .data import PADDING


class FaultF1(Metric):
    """The F1 score of the steps that are at fault; padded steps do not count."""

    higher_is_better = True
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("hits", "found", "faults"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        found = (outputs > 0) & (targets != PADDING)
        self.hits += (found & (targets == 1)).sum()
        self.found += found.sum()
        self.faults += (targets == 1).sum()

    def compute(self) -> Tensor:
        return 2 * self.hits / (self.found + self.faults).clamp(min=1)
