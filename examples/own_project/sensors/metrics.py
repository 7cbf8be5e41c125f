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
        for name in ("hits", "predicted", "faults"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        predicted = (outputs > 0) & (targets != PADDING)
        self.hits += (predicted & (targets == 1)).sum()
        self.predicted += predicted.sum()
        self.faults += (targets == 1).sum()

    def compute(self) -> Tensor:
        return 2 * self.hits / (self.predicted + self.faults).clamp(min=1)
