"""A loss with weights of its own."""

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from .data import PADDING


class FaultLoss(nn.Module):
    """The weighted mean of the binary cross entropy: faults weigh more, padded steps nothing.

    Shapes: outputs and targets (n, length). `weight` and `total` are what a window needs to divide by the
    weight of all its micro-batches.
    """

    def __init__(self, fault_weight: float = 3.0) -> None:
        super().__init__()
        self.fault_weight = fault_weight

    def weights(self, targets: Tensor) -> Tensor:
        return (1 + (self.fault_weight - 1) * targets) * (targets != PADDING)

    def weight(self, targets: Tensor) -> Tensor:
        return self.weights(targets).sum()

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = binary_cross_entropy_with_logits(outputs, targets.clamp(min=0), reduction="none")
        return (self.weights(targets) * losses).sum()

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.total(outputs, targets) / self.weight(targets)
