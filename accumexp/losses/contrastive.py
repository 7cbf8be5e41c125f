"""Contrastive losses: every other sample of the batch is a negative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .coupled import Coupled, couples, positive


@couples
def info_nce(outputs: Any, targets: Any = None, temperature: float = 0.1) -> Tensor:
    """The mean cross entropy of finding each sample's second view among those of the whole batch, and back.

    With a_i and b_i the normalised embeddings of the two views and s_ij = a_i . b_j / temperature,

        loss = 1 / 2n * sum_i (logsumexp_j s_ij - s_ii) + (logsumexp_j s_ji - s_ii)

    (van den Oord et al. 2018, arXiv:1807.03748; both directions as in Radford et al. 2021, arXiv:2103.00020).

    Args:
        outputs: a pair of embeddings, (n, d) each, or both in one tensor (n, 2, d).
        targets: not used.

    Returns:
        Shape ().

    Raises:
        ValueError: for outputs of other shapes.
    """
    first, second = _pair(outputs)
    similarities = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T / temperature
    positives = torch.arange(len(similarities), device=similarities.device)
    return (F.cross_entropy(similarities, positives) + F.cross_entropy(similarities.T, positives)) / 2


@couples
def supervised_contrastive(outputs: Tensor, targets: Tensor, temperature: float = 0.1) -> Tensor:
    """The mean over anchors of the cross entropy of finding the embeddings of the anchor's class.

    With z the normalised embeddings, P(i) those of the class of i without i itself, and A the anchors whose
    P(i) is not empty,

        loss = 1 / |A| * sum_{i in A} -1 / |P(i)| * sum_{p in P(i)} log(exp(z_i . z_p / temperature)
                                                      / sum_{a != i} exp(z_i . z_a / temperature))

    (Khosla et al. 2020, arXiv:2004.11362, equation 2). 0 if there is no anchor.

    Args:
        outputs: embeddings (n, d), or several views of each sample (n, views, d).
        targets: class indices (n,).

    Returns:
        Shape ().

    Raises:
        ValueError: for outputs or targets of other shapes.
    """
    if outputs.dim() not in (2, 3) or targets.shape != outputs.shape[:1]:
        shapes = f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"embeddings (n, d) or (n, views, d) and classes (n,) are needed, not {shapes}")
    if outputs.dim() == 3:
        targets = targets.repeat_interleave(outputs.shape[1])
    embeddings = F.normalize(outputs.flatten(0, -2), dim=1)
    similarities = embeddings @ embeddings.T / temperature
    itself = torch.eye(len(embeddings), dtype=torch.bool, device=embeddings.device)
    # Not -inf: an anchor alone in the batch would have the gradient nan.
    similarities = similarities.masked_fill(itself, torch.finfo(similarities.dtype).min)
    logarithms = similarities - similarities.logsumexp(1, keepdim=True)
    alike = (targets[:, None] == targets) & ~itself
    counts = alike.sum(1)
    each = -logarithms.where(alike, 0.0).sum(1) / counts.clamp(min=1)
    return each.sum() / (counts > 0).sum().clamp(min=1)


class InfoNCE(Coupled):
    """`info_nce` as a module."""

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature)

    def forward(self, outputs: Any, targets: Any = None) -> Tensor:
        return info_nce(outputs, targets, self.temperature)


class SupervisedContrastive(Coupled):
    """`supervised_contrastive` as a module."""

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = positive("temperature", temperature)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return supervised_contrastive(outputs, targets, self.temperature)


def _pair(outputs: Any) -> tuple[Tensor, Tensor]:
    if isinstance(outputs, Tensor) and outputs.dim() == 3 and outputs.shape[1] == 2:
        return outputs[:, 0], outputs[:, 1]
    shapes = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if isinstance(outputs, tuple | list):
        if len(outputs) == 2 and all(isinstance(o, Tensor) and o.dim() == 2 for o in outputs):
            return outputs[0], outputs[1]
        shapes = [tuple(getattr(part, "shape", ())) for part in outputs]
    raise ValueError(f"two embeddings (n, d), or one tensor (n, 2, d), are needed, not {shapes}")
