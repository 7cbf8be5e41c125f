"""Refuses numbers where a loss or a metric takes classes: torch computes something of many such shapes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..accum.loss import WeightedSamples
from ..errors import UsageError
from .metrics import Accuracy

REGRESSION = "for a regression give {}metrics=regression"


def is_class_loss(criterion: Any) -> bool:
    """Whether `criterion` is torch's loss of class indices or probabilities, with the forward of torch."""
    forward = getattr(type(criterion), "forward", None)  # one of its own may take other targets
    return forward in (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)


def check_class_loss(criterion: Any, outputs: Any, targets: Any) -> None:
    """Refuses outputs and targets of a regression for a loss of classes.

    Without classes, (n,) or (n, 1), torch takes samples for classes, or gives 0. Probabilities (n, classes)
    are right.

    Raises:
        UsageError: naming the shapes.
    """
    if isinstance(criterion, WeightedSamples):
        items = criterion.items
        criterion, targets = criterion.criterion if items is None else items.criterion, targets[0]
    if not is_class_loss(criterion) or not _are_numbers(outputs, targets):
        return
    wrong = "" if _has_classes(outputs) else "scores of classes are needed"
    if not wrong and targets.shape == outputs.shape:
        low, high = targets.aminmax()
        if not (low >= 0 and high <= 1 + 1e-3):
            wrong = f"targets from {low:.4g} to {high:.4g} are no probabilities"
    if wrong:
        name = type(criterion).__name__
        remedy = REGRESSION.format("loss=mse ")
        raise UsageError(f"loss={name}: {_shapes(outputs, targets)}, and {wrong}; {remedy}")


def check_accuracy(key: str, metric: Any, outputs: Any, targets: Any) -> None:
    """Refuses outputs and targets without classes for the project's `Accuracy`.

    Raises:
        UsageError: naming `key` and the shapes.
    """
    if not isinstance(metric, Accuracy):
        return
    outputs = outputs if metric.output is None else outputs[metric.output]
    targets = targets if metric.target is None else targets[metric.target]
    if not _are_numbers(outputs, targets):
        return
    if not _has_classes(outputs) or targets.dim() == outputs.dim():
        wrong = "it counts class indices (n, ...) that scores (n, classes, ...) give"
        raise UsageError(f"{key}: {_shapes(outputs, targets)}, and {wrong}; {REGRESSION.format('')}")


def _are_numbers(outputs: Any, targets: Any) -> bool:
    return isinstance(outputs, Tensor) and isinstance(targets, Tensor) and targets.is_floating_point()


def _has_classes(outputs: Tensor) -> bool:
    return outputs.dim() > 1 and outputs.shape[1] > 1


def _shapes(outputs: Tensor, targets: Tensor) -> str:
    kind = str(targets.dtype).removeprefix("torch.")
    return f"the model's outputs have shape {_shape(outputs)}, the targets {_shape(targets)} of {kind}"


def _shape(tensor: Tensor) -> str:
    """The shape with n for the number of samples."""
    rest = "".join(f", {size}" for size in tensor.shape[1:]) or ","
    return f"(n{rest})" if tensor.dim() else "()"
