"""Checks of targets before a loss gets them: a GPU answers a label out of range by ending the process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import UsageError

# `data.num_classes` above the largest label by this factor is a slip: the model would be made as large.
SPARSE = 1000
MOST_PLAUSIBLE = 10_000


class TargetCheck(Protocol):
    """Refuses the targets (n, ...) of samples.

    Args:
        key: of the data set.
        numbers: of the samples in it; None for all of them from 0 on.

    Raises:
        UsageError: naming a sample and its target.
    """

    def __call__(self, targets: Any, key: str, numbers: Sequence[int] | None = None) -> None: ...


@dataclass(frozen=True)
class LabelCheck:
    """Refuses class labels beyond `data.num_classes`, other than the one that the loss ignores."""

    classes: int | None
    ignored: int | None = None

    def __call__(self, targets: Any, key: str, numbers: Sequence[int] | None = None) -> None:
        if self.classes is None or self.classes <= 1:
            return
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return
        if targets.dtype == torch.bool or targets.dim() > 1 and self.ignored is None or not targets.numel():
            return
        counted = targets if self.ignored is None else targets[targets != self.ignored]
        if not counted.numel():
            return
        low, high = int(counted.min()), int(counted.max())
        if high >= self.classes or low < 0 and self.ignored is not None:
            ignored = (
                "" if self.ignored is None else f", besides {self.ignored}, which loss.ignore_index ignores"
            )
            sample, label = _first(targets, targets == (high if high >= self.classes else low), numbers)
            raise UsageError(
                f"data.num_classes={self.classes}: the labels go from {low} up to {high}{ignored} (sample "
                f"{sample} of {key} has {label}); give their number, or the loss's ignore_index"
            )
        if numbers is None and self.classes > max(SPARSE * (high + 1), MOST_PLAUSIBLE):
            raise UsageError(
                f"data.num_classes={self.classes}: the labels of {key} go up to {high}; give their number"
            )


@dataclass(frozen=True)
class ClassIndices:
    """Refuses targets that are no indices of the model's `classes`, for a loss of class indices.

    Attributes:
        dims: dimensions of the targets where they are indices; probabilities have one more.
        loss: the name of its class.
    """

    classes: int
    ignored: int
    dims: int
    loss: str

    def __call__(self, targets: Any, key: str, numbers: Sequence[int] | None = None) -> None:
        if not isinstance(targets, Tensor) or not targets.numel() or targets.dim() != self.dims:
            return
        if targets.dtype not in (torch.int64, torch.uint8):
            sample, label = _first(targets, torch.ones_like(targets, dtype=torch.bool), numbers)
            kind = str(targets.dtype).removeprefix("torch.")
            remedy = (
                "; for a regression give loss=mse metrics=regression" if targets.is_floating_point() else ""
            )
            raise UsageError(
                f"{key}: sample {sample} has the label {label} of {kind}; loss={self.loss} takes class "
                f"indices, int64{remedy}"
            )
        labels = targets.long()  # an ignored label of -100 is none of uint8
        wrong = ((labels < 0) | (labels >= self.classes)) & (labels != self.ignored)
        if wrong.any():
            sample, label = _first(targets, wrong, numbers)
            raise UsageError(
                f"{key}: sample {sample} has the label {label}, the model has {self.classes} classes, from "
                f"0 to {self.classes - 1}; and loss.ignore_index={self.ignored}"
            )


@dataclass(frozen=True)
class Probabilities:
    """Refuses targets outside of 0 to 1, for a binary cross-entropy."""

    loss: str

    def __call__(self, targets: Any, key: str, numbers: Sequence[int] | None = None) -> None:
        if not isinstance(targets, Tensor) or not targets.numel():
            return
        wrong = ~((targets >= 0) & (targets <= 1))
        if wrong.any():
            sample, target = _first(targets, wrong, numbers)
            raise UsageError(
                f"{key}: sample {sample} has the target {target}, loss={self.loss} takes numbers from 0 to 1"
            )


def _first(targets: Tensor, wrong: Tensor, numbers: Sequence[int] | None) -> tuple[int, float]:
    """Number and target of the first sample that is wrong."""
    row = int(wrong.reshape(len(wrong), -1).any(1).nonzero()[0])
    return row if numbers is None else numbers[row], targets[row][wrong[row]].reshape(-1)[0].item()
