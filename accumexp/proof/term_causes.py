"""Causes by term of a loss: which of them counts how much, or is computed on less than the window."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .certificate import Cause, Counts
from .counts import Decomposition
from .coupling import NEGLIGIBLE
from .evidence import Failure
from .float64 import DOUBLE
from .larger_batch import loss_and_terms, norm
from .loss_scopes import scope_cause
from .loss_shares import SharesByTerm
from .loss_terms import name_of
from .nested import batch_size, cloned, map_tensors
from .problem import Problem, copy_in, rows
from .ranks import all_gather
from .rounding import larger_batch_of
from .term_counts import TermFit, fit_terms, weights_of

OWN_DENOMINATOR = "divide each term's sum by its own weight in the whole window, over all ranks"
SHOWN = "the terms' own gradients times those counts leave nothing of it"
DECLARE = (
    "return its total and its weight, or set couples = True on a loss whose samples depend on each other"
)
WHOLE_WINDOW_LOSS = (
    "compute the loss on all outputs of the window at once, then go back through the micro-batches "
    "(Gao et al., arXiv 2101.06983)"
)
# Largest share of the difference from the larger batch that the micro-batches' own losses may leave.
NEGLIGIBLE_REST = 0.01
# Terms that are named one by one.
NAMED = 4


def term_causes(problem: Problem, failure: Failure, parts: Decomposition) -> tuple[list[Cause], list[Counts]]:
    """The causes that terms explain, and how often their micro-batches count. A collective call.

    None if the micro-batches' whole gradients explain it, or if nothing does. Uneven counts of a loss that
    couples samples may be those of its values on micro-batches.
    """
    fitted = parts.fit(parts.gradient)
    uneven = fitted is not None and max(fitted.counts) - min(fitted.counts) > parts.count_tolerance
    explained, any_uneven = (all_gather(fitted is not None), all_gather(uneven))
    if parts.shares is None or (all(explained) and not (problem.couples and any(any_uneven))):
        return [], []
    if all(explained):
        cause = scope_cause(problem, failure, parts)
        return all_gather(([cause] if cause else [], []))[0]
    if cause := scope_cause(problem, failure, parts):
        result: tuple[list[Cause], list[Counts]] = [cause], []
    else:
        fit = fit_terms(parts)
        result = ([], []) if fit is None else _counted(failure, parts, fit)
    # The first rank's for all: ranks with other gradients would read them differently.
    return all_gather(result)[0]


def _counted(failure: Failure, parts: Decomposition, fit: TermFit) -> tuple[list[Cause], list[Counts]]:
    wrong = {name: counts for name, counts in fit.counts.items() if not all(map(parts.is_one, counts))}
    causes = [
        failure.cause(
            "wrong denominator", f"term {name!r} {_in_words(parts, name, each)}", SHOWN, OWN_DENOMINATOR
        )
        for name, each in wrong.items()
    ]
    counts = [
        Counts(", ".join(filter(None, (failure.when, f"term {name!r}"))), parts.by_rank(each))
        for name, each in wrong.items()
    ]
    return causes[:NAMED], counts[:NAMED]


def not_a_sum_cause(problem: Problem, failure: Failure, parts: Decomposition) -> Cause | None:
    """The cause if a term of the batch is not made of the sums of its parts: it couples samples."""
    batch = failure.batch
    outputs = larger_batch_of(problem, copy_in(failure.model, DOUBLE), batch).outputs
    samples = batch_size(batch)

    def sums_of(numbers: Sequence[int]) -> dict[str, list[float]]:
        index = torch.tensor(numbers, device=problem.device)
        part = map_tensors(lambda t: t[index] if t.dim() and len(t) == samples else t, outputs)
        terms = loss_and_terms(loss, part, cloned(rows(batch, index)[1]))[1]
        return {name: [float(each) for each in term.sums(len(numbers))] for name, term in terms.items()}

    every = [numbers for each in parts.micro_batches for numbers in each]
    with problem.loss_in(DOUBLE) as loss, torch.no_grad():
        whole = sums_of(range(samples))
        sums = [sums_of(numbers) for numbers in every]
    for name, right in whole.items():
        added = [sum(part[name][k] for part in sums) for k in range(2)]
        if all(abs(a - b) <= NEGLIGIBLE * abs(b) for a, b in zip(added, right, strict=True)):
            continue
        mean = all(part[name][1] == len(numbers) for part, numbers in zip(sums, every, strict=True))
        of_parts = "the mean of its micro-batches' by samples" if mean else "made of its micro-batches' sums"
        reason = f"term {name!r} of {samples} samples is not {of_parts}"
        shown = f"{right[0] / right[1]:.6g} on the batch, {added[0] / added[1]:.6g} by micro-batches"
        return failure.cause("loss average", reason, shown, DECLARE)
    return None


def not_a_mean_cause(problem: Problem, failure: Failure, parts: Decomposition) -> Cause | None:
    """The cause if the micro-batches' own losses make the gradient: the loss is no mean over samples."""
    fit = parts.fit(parts.gradient)
    if fit is None or not all(map(parts.is_one, fit.counts)) or parts.shares is not None:
        return None
    exact = failure.expected.larger.gradient
    off = {name: torch.stack([part[name] for part in parts.parts]).sum(0) - exact[name] for name in exact}
    if norm(parts.rest()) > NEGLIGIBLE_REST * norm(off):
        return None  # rounding, say, of which the parts have as little as the larger batch
    samples = batch_size(failure.batch)
    reason = f"loss ({name_of(problem.loss)}) of {samples} samples is not the mean of its micro-batches'"
    shown = "the gradients of the loss on each micro-batch leave nothing of it"
    return failure.cause("loss average", reason, shown, WHOLE_WINDOW_LOSS)


def _in_words(parts: Decomposition, name: str, counts: list[float]) -> str:
    """What the `counts` of a term in each micro-batch mean."""
    counted = [k for k, term_weight in enumerate(weights_of(parts, name)) if term_weight]
    first = counts[counted[0]] if counted else 0.0
    if all(_near(parts, counts[k], first) for k in counted):
        if _near(parts, first, 0.0):
            return "is not in the gradient"
        return f"counts {first:.4g} times{_factor_in_words(parts, name, first)}"
    if why := _denominators_in_words(parts, name, counts):
        return why
    lost = [k for k in counted if _near(parts, counts[k], 0.0)]
    left = [counts[k] for k in counted if k not in lost]
    if lost and all(_near(parts, count, left[0]) for count in left):
        times = "" if parts.is_one(left[0]) else f", and that of the others {left[0]:.4g} times"
        return f"of {_micro_batches(parts, lost)} does not count{times}"
    shown = [0.0 if k in lost else count for k, count in enumerate(counts)]
    listed = ", ".join(f"{count:.4g}" for count in shown[:6]) + (", ..." if len(shown) > 6 else "")
    return f"counts ({listed}) times in micro-batches of {_list(weights_of(parts, name))}"


def _factor_in_words(parts: Decomposition, name: str, count: float) -> str:
    """Why a term counts `count` times in every micro-batch, in words that begin with ": "; "" if unknown."""
    steps, ranks, micro_batches = parts.problem.steps, parts.ranks, len(parts.parts)
    weights = weights_of(parts, name)
    weight = sum(weights)
    coefficient = parts.shares.coefficients[name] if isinstance(parts.shares, SharesByTerm) else 1.0
    samples = sum(parts.weights)
    reasons = [
        (1 / coefficient if coefficient else 1.0, f"its coefficient, {coefficient:g}, is left out"),
        (coefficient, f"its coefficient, {coefficient:g}, counts twice"),
        (1 / steps, f"it is divided by {steps} steps once more"),
        (1 / micro_batches, f"it is divided by {micro_batches} micro-batches once more"),
        (1 / ranks, f"it is divided by {ranks} ranks once more"),
        (steps, f"it is added over {steps} micro-batches where it should be averaged"),
        (micro_batches, f"it is added over {micro_batches} micro-batches where it should be averaged"),
        (ranks, f"it is added over {ranks} ranks where it should be averaged"),
        (weight, f"its sum is taken, not its mean over a weight of {weight:g}"),
        (weight / samples, f"it is divided by {samples:g} samples, not by its weight of {weight:g}"),
    ]
    for place, part_weight in (("last", weights[-1]), ("first", weights[0])):
        of = f"the {place} micro-batch's weight, {part_weight:g}, not by the window's, {weight:g}"
        if part_weight:
            reasons.append((weight / part_weight, f"it is divided by {of}"))
            reasons.append(
                (weight / part_weight / micro_batches, f"it is divided by {micro_batches} times {of}")
            )
    fitting = (text for value, text in reasons if not parts.is_one(value) and _near(parts, count, value))
    return next((f": {text}" for text in fitting), "")


def _denominators_in_words(parts: Decomposition, name: str, counts: list[float]) -> str:
    """By what each micro-batch's sum is divided, if that explains the counts."""
    weights = weights_of(parts, name)
    weight = sum(weights)
    # What a micro-batch's mean counts.
    means = [count * part_weight / weight for count, part_weight in zip(counts, weights, strict=True)]
    samples = sum(parts.weights)
    by_samples = [part_weight / samples for part_weight in parts.weights]
    steps = parts.problem.steps
    divided_alone = (
        f"is divided by each micro-batch's own weight, {_list(weights)}, not by the window's, {weight:g}"
    )
    for shares, how in (
        ([1.0] * len(means), "its means are added"),
        ([1 / steps] * len(means), f"its means are divided by {steps}"),
        ([1 / len(means)] * len(means), f"its means are divided by {len(means)}"),
        (by_samples, "its means count by samples"),
    ):
        pairs = zip(means, shares, weights, strict=True)
        if all(_near(parts, mean, share) for mean, share, own_weight in pairs if own_weight):
            return f"{divided_alone}: {how}"
    if parts.ranks > 1:
        of_ranks = [sum(each) for each in parts.by_rank(weights)]
        shares = [
            weight / (parts.ranks * of_rank) if of_rank else 1.0
            for of_rank, each in zip(of_ranks, parts.micro_batches, strict=True)
            for _ in each
        ]
        pairs = zip(counts, shares, weights, strict=True)
        if all(_near(parts, count, share) for count, share, own_weight in pairs if own_weight):
            return f"is divided by each rank's own weight, {_list(of_ranks)}, not by the window's, {weight:g}"
    return ""


def _near(parts: Decomposition, value: float, other: float) -> bool:
    return abs(value - other) <= max(1e-5, parts.count_tolerance) * max(1.0, abs(other))


def _micro_batches(parts: Decomposition, numbers: Sequence[int]) -> str:
    """The micro-batches of these numbers over all ranks."""
    if parts.ranks == 1:
        return f"micro-batch {', '.join(map(str, numbers))}"
    places = [(rank, k) for rank, each in enumerate(parts.micro_batches) for k in range(len(each))]
    return " and ".join(f"rank {places[n][0]}'s micro-batch {places[n][1]}" for n in numbers)


def _list(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:6])
    return f"({shown}{', ...' if len(values) > 6 else ''})"
