"""What a window needs to know of a loss: the sum over a micro-batch's items, and the items' weight.

The larger batch's loss is a weighted mean, `sum_i w_i l_i / sum_i w_i`, over items that are samples,
pixels or valid tokens. A mean cannot be accumulated: a mean of micro-batch means weighs every
micro-batch alike, whatever it holds. Its two sums can, and the lower one needs only the targets, so it
is known before the first backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from .batch import Nested, batch_size


@runtime_checkable
class WindowLoss(Protocol):
    """A loss as its two sums. Implement it where `window_loss` cannot know what your mean divides by.

    Weights are added over micro-batches and ranks; a class attribute `counts = False` says that the weight
    is no count and stays as it is.
    """

    def weight(self, targets: Any, /) -> Tensor | float:
        """Total weight of the items in `targets`: a number, or a tensor of shape ()."""
        ...

    def total(self, outputs: Any, targets: Any, /) -> Tensor:
        """Weighted sum of the items' losses, shape (): `weight(targets)` times the batch's loss."""
        ...


class MeanOverSamples(nn.Module):
    """A criterion that is a mean over samples, or over elements of which every sample has as many.

    That is every elementwise criterion of torch (MSE, L1, smooth L1, BCE, ...) and every function
    whose value on a batch is the plain mean of its values on the samples. A criterion with
    `reduction="none"` is averaged here.
    """

    # Said here, because a module that lacks an attribute takes long to say so.
    counts = True

    def __init__(self, criterion: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.criterion = criterion

    def weight(self, targets: Nested) -> float:
        return float(batch_size(targets))

    def total(self, outputs: Any, targets: Nested) -> Tensor:
        loss = self.criterion(_widened(outputs), targets)
        return (loss.mean() if loss.dim() else loss) * batch_size(targets)


class SumOverSamples(nn.Module):
    """A criterion that is a sum over samples (`reduction="sum"`): nothing is divided, by anything.

    Its weight is no count: it is 1 on any number of ranks.
    """

    counts = False

    def __init__(self, criterion: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.criterion = criterion

    def weight(self, targets: Nested) -> float:
        return 1.0

    def total(self, outputs: Any, targets: Nested) -> Tensor:
        return self.criterion(_widened(outputs), targets)


class ClassIndexLoss(nn.Module):
    """`nn.CrossEntropyLoss` or `nn.NLLLoss` with its class weights, `ignore_index` and label smoothing.

    With `reduction="mean"` torch divides by the summed class weights of the targets that are not
    ignored, and for targets that are probabilities by their number (torch.nn.CrossEntropyLoss).
    A batch whose every target is ignored weighs nothing and has no gradient, where torch says nan.

    Shapes: outputs (n, classes, ...), targets (n, ...) of class indices or (n, classes, ...) of
    probabilities.
    """

    counts = True

    def __init__(self, criterion: nn.CrossEntropyLoss | nn.NLLLoss) -> None:
        super().__init__()
        self.criterion = criterion

    @property
    def basis(self) -> tuple[bool, int]:
        """What of the criterion decides what a target weighs: whether classes do, and `ignore_index`."""
        criterion = self.criterion
        return criterion.weight is None, criterion.ignore_index

    def sample_weight(self, targets: Tensor, chosen: Tensor) -> float | None:
        """What each of the samples `chosen` of `targets` weighs, or None where they differ.

        Waits for the device once.
        """
        if self.criterion.weight is not None or targets.is_floating_point() or not len(chosen):
            return None
        valid = (targets != self.criterion.ignore_index).reshape(len(targets), -1).sum(1)
        least, most = torch.stack(valid[chosen.to(valid.device)].aminmax()).tolist()
        return float(least) if least == most else None

    def weight(self, targets: Nested) -> Tensor | float:
        targets = cast(Tensor, targets)
        if targets.is_floating_point():
            return targets.numel() / targets.shape[1 if targets.dim() > 1 else 0]
        valid = targets != self.criterion.ignore_index
        if self.criterion.weight is None:
            return valid.count_nonzero()
        return self.criterion.weight[targets.where(valid, 0)].where(valid, 0).sum()

    def total(self, outputs: Any, targets: Nested) -> Tensor:
        return self.losses(outputs, targets, "sum")

    def losses(self, outputs: Any, targets: Nested, reduction: str) -> Tensor:
        """The items' weighted losses, (n, ...) or with `reduction="sum"` their sum."""
        criterion, outputs, targets = self.criterion, _widened(outputs), cast(Tensor, targets)
        if isinstance(criterion, nn.NLLLoss):
            return nn.functional.nll_loss(
                outputs, targets, criterion.weight, ignore_index=criterion.ignore_index, reduction=reduction
            )
        return nn.functional.cross_entropy(
            outputs,
            targets,
            criterion.weight,
            ignore_index=criterion.ignore_index,
            label_smoothing=criterion.label_smoothing,
            reduction=reduction,
        )


def window_loss(criterion: Callable[..., Any] | WindowLoss) -> WindowLoss:
    """`criterion` as its two sums.

    Knows torch's criteria by what their mean divides by. Any other callable is taken as a mean over
    samples, which is wrong for a mean over items of which samples have different numbers (tokens):
    give such a loss `weight` and `total` methods (`WindowLoss`).
    """
    if isinstance(criterion, WindowLoss):
        return criterion
    reduction = getattr(criterion, "reduction", None)
    if reduction == "sum":
        return SumOverSamples(criterion)
    if type(criterion) in (nn.CrossEntropyLoss, nn.NLLLoss):
        return ClassIndexLoss(cast(nn.CrossEntropyLoss, criterion))
    return MeanOverSamples(criterion)


def _widened(outputs: Any) -> Any:
    """bf16 and fp16 outputs in fp32: a sum over items in 8 bits of mantissa is not a sum."""
    if isinstance(outputs, Tensor) and outputs.dtype in (torch.bfloat16, torch.float16):
        return outputs.float()
    return outputs
