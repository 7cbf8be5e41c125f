"""Whether a loss that couples samples is computed on a part of the window: on a micro-batch, or on a rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .certificate import Cause
from .counts import Decomposition, products
from .coupling import NEGLIGIBLE, loss_couples
from .evidence import Failure
from .float64 import DOUBLE
from .larger_batch import Gradient
from .loss_shares import SharesByOutput
from .loss_terms import name_of
from .problem import Problem
from .rounding import part_gradient, perturbed_model
from .term_counts import solved

WHOLE_WINDOW = (
    "compute it on all outputs of the window and of all ranks at once, then go back through the "
    "micro-batches, as accumexp.accum.Window does with a loss that has couples = True"
)


def scope_cause(problem: Problem, failure: Failure, parts: Decomposition) -> Cause | None:
    """The cause if a loss that couples samples, or a term of it, is computed on parts of the window."""
    shares = parts.shares
    if not isinstance(shares, SharesByOutput):
        return None
    scope = _scope_of(problem, failure, parts, shares)
    if scope is None:
        return None
    terms, where, factor = scope
    what = "it" if len(shares.terms) == 1 else f"term {' and term '.join(map(repr, terms))}"
    if len(terms) == len(shares.terms):
        what = "it"
    times = "" if parts.is_one(factor) else f", and counts {factor:.4g} times"
    reason = f"couples samples: {what} is computed on {where}, not on the window's{times}"
    by_outputs = loss_couples(problem, failure.batch)
    by_targets = loss_couples(problem, failure.batch, by_targets=True)
    if what == "it" and by_targets > NEGLIGIBLE and not by_outputs > NEGLIGIBLE:
        reason += (
            ". Samples are coupled by their targets alone, as by rewards that are normalised with a mean and "
            "a deviation"
        )
    name = name_of(problem.loss)
    shown = "the gradient of the loss on these parts is the loop's"
    return Cause("coupling loss", f"loss ({name})", reason, failure.comparison.error, shown, WHOLE_WINDOW)


def _scope_of(
    problem: Problem, failure: Failure, parts: Decomposition, shares: SharesByOutput
) -> tuple[list[str], str, float] | None:
    """(the terms that are computed on parts of the window, on which parts, how often they count)."""
    every = [numbers for each in parts.micro_batches for numbers in each]
    columns: list[Gradient] = []
    for term in shares.terms:
        columns.append(_gradient(parts, shares, shares.gradients[term], every))
    square = sum(float(g.square().sum()) for g in parts.gradient.values())
    if not square or not math.isfinite(square):
        return None
    for where, groups in _groups(parts):
        for alike in (False, True):
            try:
                with problem.loss_in(DOUBLE):
                    at_outputs = shares.on_groups(groups, alike)
            except Exception:
                continue  # a loss that refuses so few samples
            of_parts = [_gradient(parts, shares, at_outputs[term], every) for term in shares.terms]
            gram, right = _normal([*columns, *of_parts], parts.gradient)
            for terms, counts in _candidates(gram, right, len(shares.terms)):
                left = square - 2 * float(counts @ right) + float(counts @ gram @ counts)
                if (max(left, 0.0) / square) ** 0.5 <= max(parts.tolerance, 1e-7):
                    factor = float(counts[len(shares.terms) + terms[0]])
                    return [shares.terms[k] for k in terms], where, factor
    return None


def _candidates(gram: Tensor, right: Tensor, terms: int) -> Iterator[tuple[list[int], Tensor]]:
    """(terms that are computed on parts, counts of all terms on the window and on parts) to try."""
    unit = torch.eye(2 * terms, dtype=DOUBLE)
    for term in range(terms):
        fixed = unit[[k for k in range(terms) if k != term]].sum(0)
        for counts in solved(gram, right, fixed, [unit[terms + term]]):
            yield [term], counts
    if terms > 1:
        for counts in solved(gram, right, 0 * unit[0], [unit[terms:].sum(0)]):
            yield list(range(terms)), counts


def _groups(parts: Decomposition) -> Iterator[tuple[str, Sequence[Sequence[int]]]]:
    every = [numbers for each in parts.micro_batches for numbers in each]
    if len(every) > 1:
        yield "each micro-batch's samples", every
    if parts.ranks == 1:
        return
    yield "each rank's samples", [[n for numbers in each for n in numbers] for each in parts.micro_batches]
    if len(set(map(len, parts.micro_batches))) > 1:
        return
    rows = zip(*parts.micro_batches, strict=True)
    yield "the samples of one micro-batch of all ranks", [[n for part in row for n in part] for row in rows]


def _gradient(
    parts: Decomposition, shares: SharesByOutput, gradients: Sequence[Tensor], every: Sequence[Sequence[int]]
) -> Gradient:
    """The gradient of a loss with these `gradients` at the window's outputs."""
    model = perturbed_model(parts.problem, parts.failure.model, parts.failure.batch)
    total: Gradient = {}
    for numbers in every:
        share = shares.along(gradients, numbers)
        gradient, _ = part_gradient(parts.problem, model, parts.failure.batch, numbers, share=share)
        total = {name: g.double() + total[name] if total else g.double() for name, g in gradient.items()}
    return total


def _normal(columns: Sequence[Gradient], gradient: Gradient) -> tuple[Tensor, Tensor]:
    gram = torch.stack([*products(columns, columns).values()]).sum(0)
    right = torch.stack([*products(columns, [gradient]).values()]).sum(0)[:, 0]
    return gram, right
