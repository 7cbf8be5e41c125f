"""Criteria that torch lacks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Regression(nn.Module):
    """An elementwise criterion (MSE, L1, smooth L1) that also takes class labels, as one-hot vectors.

    Shapes: outputs (n, ...) and targets of the same shape; or outputs (n, classes) and labels (n,).

    Raises:
        ValueError: for other shapes. Broadcasting (n, 1) against (n,) would compare all pairs of samples.
    """

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not targets.is_floating_point() and outputs.dim() == targets.dim() + 1:
            # one_hot() would wait for the device in every micro-batch.
            targets = targets.unsqueeze(-1) == torch.arange(outputs.shape[-1], device=targets.device)
        if outputs.shape != targets.shape:
            line = f"outputs of shape {tuple(outputs.shape)} against targets of shape {tuple(targets.shape)}"
            remedy = "; make one of them as the other with squeeze(-1) or unsqueeze(-1)"
            raise ValueError(f"{line}{remedy if outputs.numel() == targets.numel() else ''}")
        return self.criterion(outputs, targets.to(outputs.dtype))
