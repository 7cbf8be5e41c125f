"""How much each micro-batch counts in a wrong gradient, by parameter, parameter group and rank.

The gradient is decomposed into the micro-batches' own gradients by least squares. The normal equations are
kept by parameter: their size is the number of micro-batches.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .evidence import Failure
from .float64 import DOUBLE
from .larger_batch import Gradient, clip_factor, norm
from .loss_shares import loss_shares
from .micro_batches import MicroBatches, rank_micro_batches
from .nested import batch_size
from .problem import Problem
from .rounding import part_gradient, perturbed_model, transformed
from .sample_ids import SampleIds

# Elements of a gradient for each micro-batch from which on any counts of them may be told.
ENOUGH = 4
# Micro-batches of which every choice is tried: 256 of them fit two elements by chance once in 10^9 times.
MOST_CHOSEN = 8


@dataclass(frozen=True)
class Fit:
    """A gradient as the sum of its micro-batches' parts, each times a count that should be 1.

    Attributes:
        counts: in the order of the micro-batches, of all ranks one after the other.
        extra: count of the term beside them, which should be 0.
        residual: what is left unexplained, relative.
    """

    counts: list[float]
    extra: float = 0.0
    residual: float = 0.0


class Decomposition:
    """The gradient of a `Failure` and the parts that its micro-batches add to the larger batch's.

    Attributes:
        micro_batches: sample numbers, by rank.
        weights: of the micro-batches in the loss (samples or valid items), of all ranks one after the other.
        parts: their gradients, in the same order.
        gradient: of the loop before clipping, and without what `transform_gradient` should have changed.
        shares: of the samples in the loss; None for a loss of one term.
        every_rank: the counts in the gradient of each rank, once they are known.
        tolerance: relative error that rounding explains.
    """

    def __init__(self, problem: Problem, failure: Failure, micro_batches: MicroBatches) -> None:
        observed = failure.observation.gradient
        assert observed is not None
        self.problem = problem
        self.failure = failure
        self.micro_batches = micro_batches
        self.every_rank: list[list[float]] | None = None
        self.tolerance = failure.tolerance
        factor = clip_factor(failure.expected.size, problem.clip_norm)
        self.gradient: Gradient = {name: g.double() / factor for name, g in observed.items()}
        if problem.transform_gradient is not None:
            exact = failure.expected.larger.gradient
            made = transformed(problem, failure.model, exact)
            self.gradient = {name: g - (made[name] - exact[name]) for name, g in self.gradient.items()}
        model = perturbed_model(problem, failure.model, failure.batch)
        every = [numbers for each in micro_batches for numbers in each]
        shares = loss_shares(problem, model, failure.batch, every)
        parts = [
            part_gradient(problem, model, failure.batch, numbers, share=shares and shares.of(numbers))
            for numbers in every
        ]
        self.shares = shares
        self.parts = [part for part, _ in parts]
        self.weights = [weight for _, weight in parts]
        if shares is None and not hasattr(problem.loss, "total"):
            self._weigh_by_items()
        self._gram = products(self.parts, self.parts)
        self._right = products(self.parts, [self.gradient])
        self._squares = {name: float(g.square().sum()) for name, g in self.gradient.items()}

    def _weigh_by_items(self) -> None:
        """Gives the parts the weights by which they add up to the larger batch's gradient.

        A plain function is taken as a mean over samples; it may be one over valid targets.
        """
        exact = self.failure.expected.larger.gradient
        if len(self.parts) < 2 or sum(g.numel() for g in exact.values()) < ENOUGH * len(self.parts):
            return
        gram = torch.stack([*products(self.parts, self.parts).values()]).sum(0)
        right = torch.stack([*products(self.parts, [exact]).values()]).sum(0)[:, 0]
        ones = torch.ones(len(self.parts), dtype=DOUBLE)
        square = sum(float(g.double().square().sum()) for g in exact.values()) or 1.0

        def left(shares: Tensor) -> float:
            return max(0.0, square - 2 * float(shares @ right) + float(shares @ gram @ shares)) / square

        if left(ones) <= 1e-12 or int(torch.linalg.matrix_rank(gram, hermitian=True)) < len(self.parts):
            return
        shares = torch.linalg.lstsq(gram, right.unsqueeze(1), driver="gelsd").solution[:, 0]
        if left(shares) > 1e-12 or not bool((shares > 0).all()):
            return
        for k, share in enumerate(shares.tolist()):
            self.parts[k] = {name: share * g for name, g in self.parts[k].items()}
            self.weights[k] *= share

    @property
    def ranks(self) -> int:
        return len(self.micro_batches)

    def by_rank(self, counts: Sequence[float]) -> list[list[float]]:
        """`counts` of all micro-batches as a list for each rank."""
        remaining = iter(counts)
        return [[next(remaining) for _ in each] for each in self.micro_batches]

    def rest(self, counts: Sequence[float] | None = None) -> Gradient:
        """What is left of the gradient without the micro-batches' parts, each times its count (1)."""
        rest = dict(self.gradient)
        for count, part in zip(counts or [1.0] * len(self.parts), self.parts, strict=True):
            rest = {name: value - count * part[name] for name, value in rest.items()}
        return rest

    def fit(self, names: Iterable[str]) -> Fit | None:
        """The counts that explain the gradient of the parameters `names`; the simplest ones, or None."""
        names = list(names)
        gram = sum(
            (self._gram[name] for name in names), torch.zeros(len(self.parts), len(self.parts), dtype=DOUBLE)
        )
        right = sum((self._right[name][:, 0] for name in names), torch.zeros(len(self.parts), dtype=DOUBLE))
        square = sum(self._squares[name] for name in names)
        if not math.isfinite(square):
            return None
        if not square:
            counted = [float(gram[k, k] == 0) for k in range(len(self.parts))]
            return Fit([0.0] * len(counted)) if not all(counted) else None
        elements = sum(self.gradient[name].numel() for name in names)
        for counts in self._candidates(gram, right, elements):
            left = square - 2 * float(counts @ right) + float(counts @ gram @ counts)
            residual = (max(left, 0.0) / square) ** 0.5
            if residual <= max(self.tolerance, 1e-7):
                return Fit([float(count) for count in counts], residual=residual)
        return None

    def _candidates(self, gram: Tensor, right: Tensor, elements: int) -> Iterator[Tensor]:
        """Counts to try, common mistakes first; any counts if there are enough `elements` to tell them."""
        number = len(self.parts)
        enough = elements >= ENOUGH * number
        ones = torch.ones(number, dtype=DOUBLE)
        yield ones
        mean = sum(self.weights) / number
        alike = torch.tensor([mean / weight if weight else 0.0 for weight in self.weights], dtype=DOUBLE)
        shapes = [ones, alike]
        for base in (ones, alike):
            for k in range(number):
                only, others = torch.zeros_like(base), base.clone()
                only[k], others[k] = base[k], 0.0
                shapes += [only, others]
        for shape in shapes:
            factor = least_squares(gram, right, shape)
            if factor is not None:
                yield factor * shape
        for k in range(number):  # one micro-batch counts differently
            one = torch.zeros_like(ones)
            one[k] = 1.0
            others = ones - one
            factor = least_squares(gram, right - gram @ others, one)
            if factor is not None:
                yield others + factor * one
        for k in range(1, number) if enough else ():  # the first ones count differently from the last ones
            first = torch.zeros_like(ones)
            first[:k] = 1.0
            columns = torch.stack([first, ones - first], 1)
            reduced = columns.T @ gram @ columns
            if int(torch.linalg.matrix_rank(reduced, hermitian=True)) == 2:
                yield columns @ torch.linalg.solve(reduced, columns.T @ right)
        if not enough and elements > 1 and number <= MOST_CHOSEN:  # some do not count
            for chosen in itertools.product((0.0, 1.0), repeat=number):
                yield torch.tensor(chosen, dtype=DOUBLE)
        if enough and int(torch.linalg.matrix_rank(gram, hermitian=True)) == number:
            yield torch.linalg.lstsq(gram, right.unsqueeze(1), driver="gelsd").solution[:, 0]

    def lost(self, counts: Sequence[float]) -> list[int]:
        """The micro-batches that do not count."""
        return [k for k, count in enumerate(counts) if abs(count) <= self.count_tolerance]

    def is_one(self, count: float) -> bool:
        return abs(count - 1) <= self.count_tolerance

    @property
    def count_tolerance(self) -> float:
        """The largest error of a count that rounding explains."""
        return max(1e-6, 4 * self.tolerance)

    def _is_complete(self) -> bool:
        """Whether the micro-batches' parts are all of the larger batch's gradient."""
        exact = self.failure.expected.larger.gradient
        left = {name: g.double() - sum(part[name] for part in self.parts) for name, g in exact.items()}
        return norm(left) <= self.tolerance * norm(exact)

    def unseen_and_doubled(self) -> tuple[list[int], list[int]]:
        """The samples of the batch in no micro-batch, and in more than one."""
        samples = range(batch_size(self.failure.batch))
        first = SampleIds(self.failure.batch[0]).first_equal()
        if len(set(first.values())) < len(samples):
            return [], []  # equal samples cannot be told apart
        occurrences = Counter(n for each in self.micro_batches for numbers in each for n in numbers)
        unseen = [number for number in samples if number not in occurrences]
        if unseen and self._is_complete():
            unseen = []  # ignored ones, or of weight 0
        return unseen, [number for number, count in sorted(occurrences.items()) if count > 1]


def decompose(problem: Problem, failure: Failure) -> Decomposition | None:
    """The decomposition of the failure's gradient; None if its micro-batches are not known. Collective."""
    micro_batches = rank_micro_batches(failure.batch, failure.observation)
    if micro_batches is None or failure.observation.gradient is None:
        return None
    if any(not numbers for each in micro_batches for numbers in each):
        return None
    return Decomposition(problem, failure, micro_batches)


def products(one: Sequence[Gradient], other: Sequence[Gradient]) -> dict[str, Tensor]:
    """The inner products of gradients, by parameter: tensors of shape (len(one), len(other))."""
    products = {}
    for name in one[0]:
        left = torch.stack([g[name].double().flatten() for g in one])
        right = torch.stack([g[name].double().flatten() for g in other])
        products[name] = (left @ right.T).cpu()
    return products


def least_squares(gram: Tensor, right: Tensor, shape: Tensor) -> float | None:
    square = float(shape @ gram @ shape)
    return float(shape @ right) / square if square else None
