"""How much each term of a loss counts in a wrong gradient, as a whole or by micro-batch, by least squares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .counts import ENOUGH, Decomposition, products
from .float64 import DOUBLE
from .larger_batch import Gradient
from .loss_shares import SharesByTerm
from .rounding import part_gradient, perturbed_model


@dataclass(frozen=True)
class TermFit:
    """A gradient as the sum of its terms' parts by micro-batch, each times a count that should be 1.

    Attributes:
        counts: by term and micro-batch, of all ranks one after the other.
    """

    counts: dict[str, list[float]]


def fit_terms(parts: Decomposition) -> TermFit | None:
    """The counts that explain the gradient of `parts`, the simplest ones; None if none do."""
    shares = parts.shares
    if shares is None or not shares.terms:
        return None
    every = [numbers for each in parts.micro_batches for numbers in each]
    model = perturbed_model(parts.problem, parts.failure.model, parts.failure.batch)
    columns: list[Gradient] = []
    for term in shares.terms:
        for numbers in every:
            share = shares.of(numbers, [term])
            gradient, _ = part_gradient(parts.problem, model, parts.failure.batch, numbers, share=share)
            columns.append({name: g.double() for name, g in gradient.items()})
    gram = torch.stack([*products(columns, columns).values()]).sum(0)
    right = torch.stack([*products(columns, [parts.gradient]).values()]).sum(0)[:, 0]
    square = sum(float(g.square().sum()) for g in parts.gradient.values())
    if not square or not math.isfinite(square):
        return None
    elements = sum(g.numel() for g in parts.gradient.values())
    sizes = [len(each) for each in parts.micro_batches]
    weights = torch.tensor([weights_of(parts, term) for term in shares.terms], dtype=DOUBLE)
    for counts in _candidates(gram, right, weights, sizes, elements):
        left = square - 2 * float(counts @ right) + float(counts @ gram @ counts)
        if (max(left, 0.0) / square) ** 0.5 <= max(parts.tolerance, 1e-7):
            rows = counts.view(len(shares.terms), len(every)).tolist()
            return TermFit(dict(zip(shares.terms, rows, strict=True)))
    return None


def weights_of(parts: Decomposition, term: str) -> list[float]:
    """The weight of a term in each micro-batch: of a loss that couples samples, their number."""
    if isinstance(parts.shares, SharesByTerm):
        return parts.shares.part_weights[term]
    return list(parts.weights)


def _candidates(
    gram: Tensor, right: Tensor, weights: Tensor, sizes: Sequence[int], elements: int
) -> Iterator[Tensor]:
    """Counts to try: a term's alone, then several terms'; each of the window, of each rank, by micro-batch.

    Args:
        weights: of each term in each micro-batch.
        sizes: the number of micro-batches of each rank.
    """
    terms, number = weights.shape
    by_micro_batch = torch.eye(terms * number, dtype=DOUBLE).view(terms, number, -1)
    of_window = by_micro_batch.sum(1)  # a row for each term
    of_ranks = [torch.stack([part.sum(0) for part in rows.split(list(sizes))]) for rows in by_micro_batch]
    ones, zeros = of_window.sum(0), torch.zeros(terms * number, dtype=DOUBLE)
    # Each micro-batch's mean counts alike.
    alike = weights.sum(1, keepdim=True) / (number * weights)
    alike = alike.where(weights > 0, 1.0)
    yield alike.flatten()
    yield from solved(gram, right, zeros, [alike.flatten()])
    splits = [of_window.unsqueeze(1), *([of_ranks] if len(sizes) > 1 else []), by_micro_batch]
    for split in splits:
        for term in range(terms):  # the others are right
            if elements >= ENOUGH * len(split[term]):
                yield from solved(gram, right, ones - of_window[term], list(split[term]))
    for split in splits[:-1]:
        yield from solved(gram, right, zeros, [row for rows in split for row in rows])
    for term in range(terms):
        others = [row for other, row in enumerate(of_window) if other != term]
        if elements >= ENOUGH * (number + len(others)):
            yield from solved(gram, right, zeros, [*others, *by_micro_batch[term]])
    if elements >= ENOUGH * terms * number:
        yield from solved(gram, right, zeros, list(by_micro_batch.flatten(0, 1)))


def solved(gram: Tensor, right: Tensor, fixed: Tensor, free: Sequence[Tensor]) -> Iterator[Tensor]:
    """The counts `fixed` plus the multiples of `free` that fit best; none if these are not told apart.

    Those of `free` that have no gradient (a weight of 0) are added once.
    """
    rows = torch.stack(list(free))
    sizes = (rows @ gram @ rows.T).diagonal().clamp_min(0).sqrt()
    fixed = fixed + rows[sizes == 0].sum(0)
    if not bool((sizes > 0).any()):
        return
    # Of unit size, because terms may differ by orders of magnitude.
    rows = rows[sizes > 0] / sizes[sizes > 0].unsqueeze(1)
    reduced = rows @ gram @ rows.T
    if int(torch.linalg.matrix_rank(reduced, hermitian=True, rtol=1e-10)) < len(rows):
        return
    yield fixed + torch.linalg.solve(reduced, rows @ (right - gram @ fixed)) @ rows
