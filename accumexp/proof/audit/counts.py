"""How often each micro-batch counts in an update, by least squares on what autograd delivered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..float64 import DOUBLE
from ..larger_batch import Gradient, norm
from .records import JointUpdate

# Singular values below this part of the largest one tell nothing apart.
DEPENDENT = 1e-7


@dataclass(frozen=True)
class LeastSquares:
    """A gradient as a sum of parts.

    Attributes:
        factors: of the parts; nan for a part that is zero.
        residual: the 2-norm of what is left, over that of the gradient.
    """

    factors: list[float]
    residual: float


def least_squares(
    parts: Sequence[Gradient], gradient: Gradient, names: Iterable[str] | None = None
) -> LeastSquares | None:
    """`gradient` of the parameters `names` (all of them) as a sum of `parts`; None if it is not unique."""
    names = sorted({name for each in (*parts, gradient) for name in each} if names is None else names)
    shapes = {name: each[name].shape for each in (*parts, gradient) for name in names if name in each}
    if not shapes:
        return None
    columns = torch.stack([_flat(part, shapes) for part in parts], 1)
    right = _flat(gradient, shapes)
    size = float(right.norm())
    kept = [k for k in range(len(parts)) if float(columns[:, k].norm())]
    if not size or not kept:
        return LeastSquares([0.0 if k in kept else float("nan") for k in range(len(parts))], float(size > 0))
    matrix = columns[:, kept]
    if len(matrix) < len(kept) or not bool(matrix.isfinite().all() & right.isfinite().all()):
        return None
    singular = torch.linalg.svdvals(matrix)
    if float(singular[-1]) <= DEPENDENT * float(singular[0]):
        return None
    solution = torch.linalg.lstsq(matrix, right.unsqueeze(1)).solution[:, 0]
    factors = [float("nan")] * len(parts)
    for k, value in zip(kept, solution.tolist(), strict=True):
        factors[k] = value
    return LeastSquares(factors, float((matrix @ solution - right).norm()) / size)


def _flat(gradient: Gradient, shapes: dict[str, torch.Size]) -> Tensor:
    zero = {name: torch.zeros(shape, dtype=DOUBLE) for name, shape in shapes.items()}
    return torch.cat([gradient.get(name, zero[name]).double().cpu().flatten() for name in shapes])


@dataclass(frozen=True)
class MicroBatchCounts:
    """How often micro-batches count in an update.

    Attributes:
        counts: of the micro-batches of all ranks, one after the other: 1 is right.
        added: with which factors the update adds what autograd delivered.
        residual: what the larger batch's gradient, as a sum of the micro-batches', leaves unexplained.
        own_residual: the same of the update's own gradient.
    """

    counts: list[float]
    added: list[float]
    residual: float
    own_residual: float

    def explains(self, tolerance: float) -> bool:
        """Whether both gradients are sums of what autograd delivered."""
        return max(self.residual, self.own_residual) <= tolerance


def micro_batch_counts(
    update: JointUpdate, gradient: Gradient, larger: Gradient, names: Iterable[str] | None = None
) -> MicroBatchCounts | None:
    """The counts of the micro-batches of `update` in its `gradient` of the parameters `names` (all).

    With `gradient` a sum of the delivered ones d_k times b_k, and `larger` one of d_k times a_k, micro-batch
    k counts b_k / a_k times. None if delivered gradients are not independent.
    """
    parts = [each.gradient for each in update.micro_batches]
    names = None if names is None else list(names)
    actual, expected = least_squares(parts, gradient, names), least_squares(parts, larger, names)
    if actual is None or expected is None:
        return None
    counts = [
        1.0 if b != b or a != a else b / a if a else float("inf")
        for b, a in zip(actual.factors, expected.factors, strict=True)
    ]
    return MicroBatchCounts(counts, actual.factors, expected.residual, actual.residual)


def cancellation(update: JointUpdate) -> float:
    """The sum of the micro-batches' gradient norms over the norm of their sum, at least 1.

    Micro-batches round relative to their own gradients, which may be larger than the sum.
    """
    parts = [each.gradient for each in update.micro_batches if each.gradient]
    if not parts:
        return 1.0
    names = {name for part in parts for name in part}
    total = {name: torch.stack([p[name] for p in parts if name in p]).sum(0) for name in names}
    size = norm(total)
    return max(1.0, sum(norm(part) for part in parts) / size) if size else 1.0


def relative_error(gradient: Gradient, expected: Gradient) -> tuple[float, str]:
    """(the worst parameter's error over the norm of all of `expected`, its name)."""
    names = sorted(set(gradient) | set(expected))
    size = norm(expected) if expected else 0.0
    worst, where = 0.0, ""
    for name in names:
        one, other = gradient.get(name), expected.get(name)
        if one is None or other is None:
            present = other if one is None else one
            error = float(present.double().norm())  # type: ignore[union-attr]
        else:
            error = float((one.double() - other.double()).norm())
        figure = error / size if size else (float("inf") if error else 0.0)
        if figure != figure:
            return float("nan"), name
        if figure > worst or not where:
            worst, where = figure, name
    return worst, where
