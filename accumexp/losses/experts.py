"""The balance loss of a mixture of experts, over the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .coupled import Coupled, couples


@couples
def load_balance(outputs: Any, targets: Any = None, top_k: int = 1) -> Tensor:
    """E * sum_e f_e P_e, least for a router that spreads the batch's tokens evenly over its E experts.

    f_e is the fraction of tokens that have expert e among their `top_k`, P_e the mean of its probability
    (Fedus et al. 2022, arXiv:2101.03961, equation 4). Both are means over all tokens of the batch: the
    product of two means of a micro-batch is another loss, which asks for balance within every micro-batch
    (Qiu et al. 2025, arXiv:2501.11873). The gradient goes through P_e alone. At balance the value is `top_k`.

    Args:
        outputs: the router's logits, (n, ..., experts), or a sequence of those of several layers, of which
            the mean is taken (transformers' models join the tokens of all layers instead).
        targets: not used.

    Returns:
        Shape ().
    """
    if not isinstance(outputs, Tensor):
        layers = [load_balance(layer, targets, top_k) for layer in outputs]
        return torch.stack(layers).mean()
    logits = outputs.flatten(0, -2)
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(top_k, 1).indices, 1.0)
    return logits.shape[1] * (chosen.mean(0) * logits.softmax(1).mean(0)).sum()


class LoadBalance(Coupled):
    """`load_balance` as a module."""

    def __init__(self, top_k: int = 1) -> None:
        super().__init__()
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: experts a token is sent to, at least 1")
        self.top_k = top_k

    def forward(self, outputs: Any, targets: Any = None) -> Tensor:
        return load_balance(outputs, targets, self.top_k)
