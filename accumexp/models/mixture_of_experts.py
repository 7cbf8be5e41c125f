"""A classifier with a mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MixtureOfExperts(nn.Module):
    """A linear layer, a mixture of experts with a residual connection, and a linear classifier.

    Each sample goes to the one expert that the router finds most probable, and its result is multiplied by
    that probability (Switch, Fedus et al. 2022, arXiv:2101.03961). All experts are computed, none has a
    capacity, so a sample's output does not depend on the others of its batch.

    Args:
        inputs: numbers in a sample.
        num_classes: number of classes.
        experts: number of experts.
        width: features between the layers.
        hidden: units in the hidden layer of an expert.

    Shapes: (n, ...) to a dict of `logits` (n, num_classes) and `router`, the router's logits (n, experts).
    """

    def __init__(
        self, inputs: int, num_classes: int, experts: int = 8, width: int = 64, hidden: int = 32
    ) -> None:
        super().__init__()
        if experts < 1:
            raise ValueError(f"experts={experts}: at least 1 is needed")
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU())
        self.router = nn.Linear(width, experts, bias=False)
        self.enter = nn.Parameter(torch.randn(experts, width, hidden) * (2 / width) ** 0.5)
        self.leave = nn.Parameter(torch.randn(experts, hidden, width) * (1 / hidden) ** 0.5)
        self.last = nn.Linear(width, num_classes)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        features = self.first(inputs)
        router = self.router(features)
        probability, expert = router.softmax(1).max(1)
        hidden = torch.einsum("nw,ewh->neh", features, self.enter).relu()
        results = torch.einsum("neh,ehw->new", hidden, self.leave)
        chosen = results.gather(1, expert.view(-1, 1, 1).expand(-1, 1, results.shape[2])).squeeze(1)
        return {"logits": self.last(features + probability.unsqueeze(1) * chosen), "router": router}
