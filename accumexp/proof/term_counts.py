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
    for counts in _candidates(gram, right, len(shares.terms), len(every), elements):
        left = square - 2 * float(counts @ right) + float(counts @ gram @ counts)
        if (max(left, 0.0) / square) ** 0.5 <= max(parts.tolerance, 1e-7):
            rows = counts.view(len(shares.terms), len(every)).tolist()
            return TermFit(dict(zip(shares.terms, rows, strict=True)))
    return None


def _candidates(
    gram: Tensor, right: Tensor, terms: int, micro_batches: int, elements: int
) -> Iterator[Tensor]:
    """Counts to try: one for each term; by micro-batch for one term; for several terms."""
    unit = torch.eye(terms * micro_batches, dtype=DOUBLE)
    whole = unit.view(terms, micro_batches, -1).sum(1)  # a row for each term
    by_term = unit.view(terms, micro_batches, -1)
    ones = torch.ones(terms * micro_batches, dtype=DOUBLE)
    for term in range(terms):  # the others are right
        yield from solved(gram, right, ones - whole[term], [whole[term]])
    yield from solved(gram, right, 0 * ones, list(whole))
    for term in range(terms):
        if elements < ENOUGH * micro_batches:
            continue
        others = [row for number, row in enumerate(whole) if number != term]
        yield from solved(gram, right, ones - whole[term], list(by_term[term]))
        yield from solved(gram, right, 0 * ones, [*others, *by_term[term]])
    if elements >= ENOUGH * terms * micro_batches:
        yield from solved(gram, right, 0 * ones, list(unit))


def solved(gram: Tensor, right: Tensor, fixed: Tensor, free: Sequence[Tensor]) -> Iterator[Tensor]:
    """The counts `fixed` plus the multiples of `free` that fit best; none if these are not told apart."""
    rows = torch.stack(list(free))
    # Of unit size, because terms may differ by orders of magnitude.
    sizes = (rows @ gram @ rows.T).diagonal().clamp_min(0).sqrt()
    if not bool((sizes > 0).all()):
        return
    rows = rows / sizes.unsqueeze(1)
    reduced = rows @ gram @ rows.T
    if int(torch.linalg.matrix_rank(reduced, hermitian=True, rtol=1e-10)) < len(rows):
        return
    yield fixed + torch.linalg.solve(reduced, rows @ (right - gram @ fixed)) @ rows
