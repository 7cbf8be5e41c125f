"""Losses as two sums that can be accumulated: of the items' weighted losses, and of their weights.

The larger batch's loss is `sum_i w_i l_i / sum_i w_i` over items that are samples, pixels or valid tokens.
The denominator needs only the targets, so it is computed before the first backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from .batch import Nested, batch_size
from .refusals import LossRefused
from .terms import SeveralTerms, TermsLoss, as_terms, sum_of, terms_loss

REDUCTIONS = ("mean", "sum", "none", "batchmean")


@runtime_checkable
class WindowLoss(Protocol):
    """A loss as two sums. Implement it for a mean over anything else than samples.

    Weights are added over micro-batches and ranks, unless a class attribute `counts = False` declares that
    the weight is a constant.
    """

    def weight(self, targets: Any, /) -> Tensor | float:
        """The total weight of the items in `targets`: a number, or a tensor of shape ()."""
        ...

    def total(self, outputs: Any, targets: Any, /) -> Tensor:
        """The weighted sum of the items' losses, shape (): `weight(targets)` times the batch's loss."""
        ...


class _CriterionLoss(nn.Module):
    """Base of the losses that wrap a criterion."""

    # Defined here because looking up a missing attribute of a module is slow.
    counts = True
    returns_terms = False

    def __init__(self, criterion: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.criterion: Any = criterion


class MeanOverSamples(_CriterionLoss):
    """A criterion that is a mean over samples, or over elements if all samples have equally many.

    These are torch's elementwise criteria (MSE, L1, smooth L1, BCE, ...) and every function whose value on
    a batch is the mean of its values on the samples. A criterion with `reduction="none"` is averaged here.

    Attributes:
        returns_terms: whether the function was seen to return terms by name (`SeveralTerms`).
    """

    def weight(self, targets: Nested) -> float:
        return float(batch_size(targets))

    def total(self, outputs: Any, targets: Nested) -> Tensor:
        loss = self.criterion(_widened(outputs), targets)
        if isinstance(loss, Mapping):
            self.returns_terms = True
            return sum_of(as_terms(loss, targets)) * batch_size(targets)
        if not isinstance(loss, Tensor):
            kind = type(loss).__name__
            raise LossRefused(
                f"the loss returned a {kind}: a tensor, or a mapping of terms by name, is needed"
            )
        return (loss.mean() if loss.dim() else loss) * batch_size(targets)


class SumOverSamples(_CriterionLoss):
    """A criterion that is a sum over samples (`reduction="sum"`). Its weight is 1 on any number of ranks."""

    counts = False

    def weight(self, targets: Nested) -> float:
        return 1.0

    def total(self, outputs: Any, targets: Nested) -> Tensor:
        return self.criterion(_widened(outputs), targets)


class ClassIndexLoss(_CriterionLoss):
    """`nn.CrossEntropyLoss` or `nn.NLLLoss` with its class weights, `ignore_index` and label smoothing.

    With `reduction="mean"` torch divides by the summed class weights of the targets that are not
    ignored, and for targets that are probabilities by their number (torch.nn.CrossEntropyLoss).
    A batch whose targets are all ignored has weight 0 and gradient 0, where torch returns nan.

    Shapes: outputs (n, classes, ...), targets (n, ...) of class indices or (n, classes, ...) of
    probabilities.
    """

    def weight(self, targets: Nested) -> Tensor | float:
        targets = cast(Tensor, targets)
        if targets.is_floating_point():
            return targets.numel() / targets.shape[1 if targets.dim() > 1 else 0]
        valid = targets.long() != self.criterion.ignore_index  # -100 is 156 among uint8
        if self.criterion.weight is None:
            return valid.count_nonzero()
        return self.criterion.weight[targets.where(valid, 0)].where(valid, 0).sum()

    def total(self, outputs: Any, targets: Nested) -> Tensor:
        return self.losses(outputs, targets, "sum")

    def losses(self, outputs: Any, targets: Nested, reduction: str) -> Tensor:
        """The items' weighted losses, shape (n, ...), or with `reduction="sum"` their sum, shape ()."""
        criterion, outputs, targets = self.criterion, _widened(outputs), cast(Tensor, targets)
        options: dict[str, Any] = {"ignore_index": criterion.ignore_index, "reduction": reduction}
        if isinstance(criterion, nn.NLLLoss):
            return F.nll_loss(outputs, targets, criterion.weight, **options)
        options["label_smoothing"] = criterion.label_smoothing
        return F.cross_entropy(outputs, targets, criterion.weight, **options)


class OverriddenClassIndexLoss(ClassIndexLoss):
    """A subclass of `nn.CrossEntropyLoss` or `nn.NLLLoss` with a `forward` of its own.

    It is taken as the mean that its parent is: over the targets that are not ignored, with its weights.
    """

    def total(self, outputs: Any, targets: Nested) -> Tensor:
        loss = self.criterion(_widened(outputs), targets)
        return loss.sum() if loss.dim() else loss * self.weight(targets)


class WeightedSamples(nn.Module):
    """A criterion with a weight for each sample: `sum_i w_i l_i / sum_i w_i` over the window.

    The mean is over the criterion's items: of a class-index loss an item's weight is `w_i` times its class
    weight, ignored items weigh nothing; of other criteria the items are samples, whose loss is the mean of
    their elements. Targets are pairs (targets, weights), the weights of shape (n,).

    Args:
        criterion: of torch, or a module around one, whose `reduction` is "mean" or "none".

    Raises:
        ValueError: for a criterion that gives no loss for each sample.
    """

    counts = True

    def __init__(self, criterion: Any) -> None:
        super().__init__()
        name = type(criterion).__name__
        if isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss):
            inner = window_loss(criterion)
            if type(inner) is not ClassIndexLoss:
                raise ValueError(f"{name} has its own forward or sums, so it gives no loss for each sample")
            self.items: ClassIndexLoss | None = inner
        else:
            criterion = copy.deepcopy(criterion)
            parts: list[Any] = list(criterion.modules()) if isinstance(criterion, nn.Module) else [criterion]
            reducing = [part for part in parts if getattr(part, "reduction", None) in ("mean", "none")]
            if isinstance(criterion, WindowLoss) or not reducing:
                raise ValueError(f"{name} gives no loss for each sample (it has no reduction to set to none)")
            for part in reducing:
                part.reduction = "none"
            self.items = None
        self.criterion = criterion

    def weight(self, targets: Any) -> Tensor:
        targets, weights = targets
        if self.items is None:
            return weights.sum()
        items = _item_weights(self.items.criterion, targets)
        return ((items.flatten(1).sum(1) if items.dim() > 1 else items) * weights).sum()

    def total(self, outputs: Any, targets: Any) -> Tensor:
        targets, weights = targets
        if self.items is None:
            losses = self.criterion(_widened(outputs), targets)
        else:
            losses = self.items.losses(outputs, targets, "none")
        if losses.shape[:1] != weights.shape:
            raise ValueError(f"losses of shape {tuple(losses.shape)} for weights {tuple(weights.shape)}")
        if losses.dim() > 1:
            losses = losses.flatten(1).mean(1) if self.items is None else losses.flatten(1).sum(1)
        return (losses * weights.to(losses.dtype)).sum()


def _item_weights(criterion: nn.CrossEntropyLoss | nn.NLLLoss, targets: Tensor) -> Tensor:
    """The weight of each item of a class-index loss: 1 or its class's, 0 if ignored."""
    if targets.is_floating_point():
        return targets.new_ones(targets.shape[:1] + targets.shape[2:])
    valid = targets != criterion.ignore_index
    if criterion.weight is None:
        return valid.to(torch.get_default_dtype())
    return criterion.weight[targets.where(valid, 0)].where(valid, 0)


def window_loss(criterion: Callable[..., Any] | WindowLoss | TermsLoss) -> WindowLoss:
    """Converts `criterion` to a `WindowLoss`.

    torch's criteria and their subclasses are recognised by type and `reduction`, losses of several terms by
    their method `terms`, and those that couple samples by `couples = True`. Any other callable is
    treated as a mean over samples. A mean over items whose number differs between samples (tokens) is not
    one: implement the methods `weight` and `total` of `WindowLoss` for it.

    Raises:
        ValueError: for a criterion of torch with a `reduction` that torch does not have.
    """
    if several := terms_loss(criterion):
        return several
    if isinstance(criterion, MeanOverSamples) and criterion.returns_terms:
        return SeveralTerms(criterion.criterion)
    if isinstance(criterion, WindowLoss):
        return criterion
    criterion = cast(Callable[..., Any], criterion)
    reduction = getattr(criterion, "reduction", None)
    if isinstance(criterion, _Loss) and reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction}: one of {', '.join(REDUCTIONS)}")
    if reduction == "sum":
        return SumOverSamples(criterion)
    if isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss):
        inherited = type(criterion).forward in (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)
        return ClassIndexLoss(criterion) if inherited else OverriddenClassIndexLoss(criterion)
    return MeanOverSamples(criterion)


def _widened(outputs: Any) -> Any:
    """Casts bf16 and fp16 outputs to fp32, because a sum over items needs more bits than theirs."""
    if isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16):
        return outputs.float()
    return outputs
