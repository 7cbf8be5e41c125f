"""Criteria that torch does not have in the form an experiment needs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Regression(nn.Module):
    """An elementwise criterion (MSE, L1, smooth L1) that also takes class labels, as one-hot vectors.

    Shapes: outputs (n, ...) and targets of the same shape; or outputs (n, classes) and labels (n,).

    Raises:
        ValueError: if the shapes differ otherwise. Broadcasting (n, 1) against (n,) would compare every
            sample with every other.
    """

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not targets.is_floating_point() and outputs.dim() == targets.dim() + 1:
            # one_hot() would read the labels on the host, once a micro-batch.
            targets = targets.unsqueeze(-1) == torch.arange(outputs.shape[-1], device=targets.device)
        if outputs.shape != targets.shape:
            raise ValueError(
                f"outputs of shape {tuple(outputs.shape)} against targets of shape {tuple(targets.shape)}"
            )
        return self.criterion(outputs, targets.to(outputs.dtype))
