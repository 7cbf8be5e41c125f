"""What a loss averages over, measured on one batch by comparing its value with those of the batch's parts.

A window adds its micro-batches' losses, each times its number of samples. That is the larger batch's loss if
the loss is a mean over samples. A loss with ignored targets, a mask or weights has another denominator.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .averages import TOLERANCE, Average, two_means
from .float64 import DOUBLE, keep_float64
from .larger_batch import call, loss_weight, mean_loss
from .loss_items import (
    has_samples,
    ignore_index_of,
    is_mask,
    item_counts,
    leaves,
    likely_counts,
    map_leaves,
    samples_of,
    with_ignored,
)
from .loss_terms import couples, declares_terms
from .problem import forked_rng

# The batch is measured in at most as many parts.
PARTS = 16


def loss_average(
    loss: Any,
    outputs: Any,
    targets: Any,
    model: nn.Module | None = None,
    inputs: Any = None,
) -> Average | None:
    """What `loss` averages over; None if it is a mean over samples, or if that cannot be measured.

    None too for a loss that declares its terms and their weights, or that it couples samples.

    Evaluates copies of the loss on the whole batch and on its parts, without gradients, on the CPU and in
    fp64 where it accepts that. If all samples have as many items, it is measured again with some targets, or
    elements of a mask, marked as ignored in a copy. Never raises.

    Args:
        loss: a function of (outputs, targets), or an object with `weight` and `total`, as in `certify`.
        outputs: of the model for the batch: any nesting of tensors, samples first.
        targets: of the batch, samples first.
        model, inputs: if given, a copy of the model in eval mode is called on parts of `inputs` where
            `outputs` hold a number of the whole batch, such as a loss that the model computes from labels.
    """
    if couples(loss) or declares_terms(loss):
        return None
    try:
        with torch.no_grad():
            return _measure(loss, outputs, targets, model, inputs)
    except Exception:
        return None


def _measure(loss: Any, outputs: Any, targets: Any, model: Any, inputs: Any) -> Average | None:
    samples = len(next(leaf for leaf in leaves(targets) if leaf.dim()))
    if samples < 2:
        return None
    if any(t.is_floating_point() and not has_samples(t, samples) for t in leaves(outputs)):
        if model is None:
            return None
        # A copy, because a forward pass may change buffers.
        return _Batch(loss, outputs, targets, samples, copy.deepcopy(model).eval(), inputs).average(
            vary=False
        )
    original = leaves(outputs)[0].device
    for device in dict.fromkeys((torch.device("cpu"), original)):
        for dtype in (DOUBLE, None):
            moved = functools.partial(_moved, device=device, dtype=dtype)
            try:
                with keep_float64(dtype or torch.float32):
                    # On a GPU an index out of bounds ends the process; on the CPU it raises.
                    batch = _Batch(moved(loss), moved(outputs), moved(targets), samples)
                    return batch.average(vary=device.type == "cpu")
            except Exception:
                continue
    return None


class _Batch:
    """A loss on one batch and on its parts.

    Attributes:
        whole: the loss of the batch.
        parts, values: samples alone, else quarters or halves, and the loss of each.
        draws: whether the loss draws from torch's generator.
    """

    def __init__(
        self, loss: Any, outputs: Any, targets: Any, samples: int, model: Any = None, inputs: Any = None
    ) -> None:
        self.loss = loss
        self.outputs = outputs
        self.targets = targets
        self.samples = samples
        self.model = model
        self.inputs = inputs
        self.draws = False
        self.whole = self._value(slice(None))
        self.parts, self.values = self._split()

    def _rows(self, tree: Any, rows: Any) -> Any:
        return samples_of(tree, rows, self.samples)

    def _value(self, rows: Any) -> float:
        """The loss of the samples `rows`, with the same state and random draws each time."""
        if self.model is None:
            outputs = self._rows(self.outputs, rows)
        else:
            outputs = call(self.model, self._rows(self.inputs, rows))
        loss = copy.deepcopy(self.loss)
        with forked_rng(leaves(self.targets)[0].device):
            torch.manual_seed(0)
            before = torch.get_rng_state()
            value = float(mean_loss(loss, outputs, self._rows(self.targets, rows)))
            self.draws |= not torch.equal(before, torch.get_rng_state())
        return value

    def _split(self) -> tuple[list[slice], list[float]]:
        """
        Raises:
            Exception: of the loss, if it accepts no part.
        """
        refusal: Exception = ValueError()
        for count in dict.fromkeys((min(self.samples, PARTS), min(self.samples, 4), 2)):
            edges = [self.samples * k // count for k in range(count + 1)]
            parts = [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
            try:
                return parts, [self._value(part) for part in parts]
            except Exception as error:
                refusal = error
        raise refusal

    def average(self, vary: bool) -> Average | None:
        """What the loss averages over; `vary` allows other targets."""
        if not math.isfinite(self.whole) or self._value(slice(None)) != self.whole:
            return None  # nothing to compare with, or another value each time
        if not self.is_additive:
            return self._average()
        if max(self.values) - min(self.values) <= TOLERANCE * abs(self.whole) and self.model is None:
            # Equal losses, as after a last layer of zeros, have the same mean whatever their weights.
            changed = self._changed(outputs=_noisy(self.outputs))
            if changed is not None and not changed.is_additive:
                return changed._average()
        return self._average_of_ignored() if vary and not hasattr(self.loss, "total") else None

    @property
    def is_additive(self) -> bool:
        """Whether the window's sum over the parts is the whole batch's loss."""
        weights = [float(loss_weight(self.loss, self._rows(self.targets, part))) for part in self.parts]
        return self._is_mean(weights, float(loss_weight(self.loss, self.targets)))

    def _is_mean(self, weights: list[float], total: float | None = None) -> bool:
        """Whether the whole batch's loss is the sum of the parts', each times its weight, over `total`."""
        total = sum(weights) if total is None else total
        if not total or not math.isfinite(total):
            return False
        # A part of weight 0 has no mean.
        terms = [w / total * value for w, value in zip(weights, self.values, strict=True) if w]
        scale = max(abs(self.whole), sum(map(abs, terms)))
        return abs(sum(terms) - self.whole) <= TOLERANCE * scale

    def _average(self) -> Average | None:
        """What a loss that is no mean over samples averages over."""
        if hasattr(self.loss, "total"):
            return None if self.draws else Average("total", math.nan, self.samples)
        if self._is_mean([1.0] * len(self.parts), 1.0):
            return Average("sum", 1.0, self.samples)
        for description, count in self._counts():
            if self._is_mean([count(part) for part in self.parts]):
                weight = count(slice(None))
                return Average("items", weight, self.samples, description.format(weight))
        if self.draws:
            return None  # other draws for a part than for the whole batch
        if self._has_weights():
            return Average("items", math.nan, self.samples, "items of other weights than 1")
        return Average("coupled", math.nan, self.samples, self._two_means())

    def _two_means(self) -> str:
        """The items of two means whose sum the loss is, in words; "" if it is no such sum."""
        count = len(self.parts)
        if count < 4 or not all(map(math.isfinite, self.values)):
            return ""  # as many unknowns as equations
        unions: list[tuple[int, ...]] = [(k, k + d) for d in (1, 2) for k in range(count - d)]
        numbers = torch.arange(self.samples)
        values = [self._value(torch.cat([numbers[self.parts[k]] for k in union])) for union in unions]
        unions.append(tuple(range(count)))
        values.append(self.whole)
        items: list[tuple[str, list[float]]] = [
            (f"{self.samples} samples", [float(part.stop - part.start) for part in self.parts])
        ]
        for description, number in self._counts(likely_counts):
            weights = [number(part) for part in self.parts]
            if all(weights):
                items.append((description.format(sum(weights)), weights))
        return two_means(self.values, unions, values, items)

    def _counts(self, kinds: Any = item_counts) -> Iterator[tuple[str, Callable[[Any], float]]]:
        """Descriptions of items of these `kinds`, and functions that count them in the samples of a part."""
        trees = [("targets", self.targets), ("inputs", self.inputs), ("outputs", self.outputs)]
        for where, tree in trees:
            tensors = leaves(tree)
            for number, leaf in enumerate(tensors):
                if not has_samples(leaf, self.samples):
                    continue
                if where != "targets" and leaf.is_floating_point() and not is_mask(leaf):
                    continue
                for description, count in kinds(leaf, where, len(tensors) == 1, ignore_index_of(self.loss)):
                    yield description, functools.partial(self._count, tree, number, count)

    def _count(self, tree: Any, number: int, count: Callable[[Tensor], float], rows: Any) -> float:
        return count(leaves(self._rows(tree, rows))[number])

    def _has_weights(self) -> bool:
        """Whether the loss is a weighted mean of the parts' losses, with the weights that pairs of them show.

        For two parts, L_ij (w_i + w_j) = w_i L_i + w_j L_j gives w_j / w_i.
        """
        finite = [k for k, value in enumerate(self.values) if math.isfinite(value)]
        if len(finite) < 3:
            return False  # two parts have such weights whatever the loss is
        first = finite[0]
        weights = [0.0] * len(self.parts)
        weights[first] = 1.0
        numbers = torch.arange(self.samples)
        for k in finite[1:]:
            both = self._value(torch.cat([numbers[self.parts[first]], numbers[self.parts[k]]]))
            weights[k] = (both - self.values[first]) / ((self.values[k] - both) or math.nan)
        return all(w >= 0 and math.isfinite(w) for w in weights) and self._is_mean(weights)

    def _average_of_ignored(self) -> Average | None:
        """What a loss averages over that ignores targets of which the batch has none."""
        for number, leaf in enumerate(leaves(self.targets)):
            if not has_samples(leaf, self.samples):
                continue
            for description, count, ignoring in with_ignored(leaf, ignore_index_of(self.loss)):
                targets = map_leaves(lambda t, a=leaf, b=ignoring: b if t is a else t, self.targets)
                changed = self._changed(targets=targets)
                if changed is None or changed.draws or changed.is_additive:
                    continue
                if changed._is_mean([changed._count(targets, number, count, p) for p in changed.parts]):
                    weight = count(leaf)
                    return Average("items", weight, self.samples, description.format(weight))
        return None

    def _changed(self, outputs: Any = None, targets: Any = None) -> _Batch | None:
        """The batch with other outputs or targets; None if the loss does not accept them."""
        outputs = self.outputs if outputs is None else outputs
        targets = self.targets if targets is None else targets
        try:
            changed = _Batch(self.loss, outputs, targets, self.samples)
        except Exception:
            return None
        return changed if math.isfinite(changed.whole) else None


def _noisy(outputs: Any) -> Any:
    """`outputs` with noise on their floating point tensors; probabilities stay such."""
    generator = torch.Generator().manual_seed(0)

    def noisy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        changed = tensor + 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor)
        return changed.clamp(0.01, 0.99) if bool(((tensor >= 0) & (tensor <= 1)).all()) else changed

    return map_leaves(noisy, outputs)


def _moved(part: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A copy of a loss or of a batch's tensors on `device`, floating point in `dtype` if given."""
    if isinstance(part, nn.Module):
        return copy.deepcopy(part).to(device, dtype)
    return map_leaves(
        lambda t: t.detach().to(device, dtype if t.is_floating_point() else None, copy=True), part
    )
