"""The loss that a model returns in its output."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..accum.batch import batch_size, tensors

OVER = ("samples", "labels")


class FromOutput(nn.Module):
    """A loss that the model computes itself, such as `loss` of transformers' ModelOutput.

    It has to be a mean over the micro-batch's samples or labels, and is weighed by their number. An auxiliary
    loss that couples samples (a balance loss, `aux_loss`) is no such mean: take what it is computed from,
    such as `router_logits`, with `load_balance`.

    Args:
        name: the key or position of the loss in the output.
        over: what the model's mean is taken over: "samples", or "labels" that are not `ignore_index`.
        skipped: labels at the beginning of each row that the model does not predict: 1 for a causal language
            model, which shifts them.

    Raises:
        ValueError: for another `over`, or `skipped` below 0.
    """

    counts = True

    def __init__(
        self, name: str | int = "loss", over: str = "samples", ignore_index: int = -100, skipped: int = 0
    ) -> None:
        super().__init__()
        if over not in OVER:
            raise ValueError(f"over={over}: one of {', '.join(OVER)}")
        if skipped < 0:
            raise ValueError(f"skipped={skipped}: labels in each row, at least 0")
        self.name = name
        self.over = over
        self.ignore_index = ignore_index
        self.skipped = skipped

    def weight(self, targets: Any) -> Tensor | float:
        """The samples of `targets`, or its labels (n, ...) that count."""
        if self.over == "samples":
            return float(batch_size(targets))
        (labels,) = tensors(targets)
        labels = labels[..., self.skipped :] if self.skipped else labels
        return (labels != self.ignore_index).sum()

    def total(self, outputs: Any, targets: Any) -> Tensor:
        weight = self.weight(targets)
        loss = self.forward(outputs, targets)
        # Over no labels the model's mean is nan.
        return loss.where(weight > 0, 0.0) * weight if isinstance(weight, Tensor) else loss * weight

    def forward(self, outputs: Any, targets: Any = None) -> Tensor:
        """The model's own loss, shape ().

        Raises:
            ValueError: if the output has none.
        """
        try:
            loss = outputs[self.name]
        except (KeyError, IndexError, TypeError) as error:
            there = f", it has {', '.join(map(str, outputs))}" if hasattr(outputs, "keys") else ""
            raise ValueError(f"the model's output has no {self.name!r}{there}") from error
        return loss.float().mean() if loss.element_size() == 2 else loss.mean()
