"""Why a run's updates are not the larger batch's: order of steps and samples, counts, learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from ..certificate import Cause, Counts, number
from ..diagnosis import WITHOUT_STATISTICS
from ..larger_batch import Gradient
from .count_wording import counts_in_words, factor_in_words, updates_in_words
from .counts import least_squares, micro_batch_counts, relative_error
from .order import sample_causes, step_causes
from .pairs import Comparison, Pair

DIVIDE = "divide every micro-batch's sum by the weight of the whole window, once"
# An error of the clipped gradient that training would hardly show.
LITTLE = 1e-3
# Updates whose counts a certificate shows.
MOST_COUNTS = 8
CLIP_ONCE = "clip once, after the window's last micro-batch"


def find_causes(comparison: Comparison, steps: int) -> tuple[list[Cause], list[Counts]]:
    """The causes of failed checks, the most important one first, and counts of micro-batches."""
    causes = [*step_causes(comparison), *sample_causes(comparison)]
    of_gradients, counts = _gradient_causes(comparison, steps)
    causes += of_gradients
    if cause := _rate_cause(comparison):
        causes.append(cause)
    causes += _rank_causes(comparison)
    if cause := _own_loss_cause(comparison):
        causes.append(cause)
    return causes, counts


def _gradient_causes(comparison: Comparison, steps: int) -> tuple[list[Cause], list[Counts]]:
    counts: list[Counts] = []
    wrong = [pair for pair in comparison.pairs if pair in comparison.failing or comparison.hidden(pair)]
    right = [pair for pair in comparison.pairs if pair not in wrong]
    for pair in [*right[:1], *wrong[:MOST_COUNTS]]:
        gradient, larger, _ = _gradients(comparison, pair)
        micro_counts = micro_batch_counts(pair.update, gradient, larger)
        if micro_counts is not None and micro_counts.explains(_tolerance(comparison, pair)):
            counts.append(Counts(f"update {pair.number + 1}", _by_rank(pair, micro_counts.counts)))
    causes: dict[str, tuple[Cause, list[int]]] = {}
    for pair in wrong:
        cause = _cause_of(comparison, pair, steps)
        causes.setdefault(cause.source, (cause, []))[1].append(pair.number)
    total = len(comparison.updates)
    return [
        cause
        if len(numbers) == len(comparison.pairs)
        else replace(cause, reason=f"{cause.reason} ({updates_in_words(numbers)} of {total})")
        for cause, numbers in causes.values()
    ], counts


def _gradients(comparison: Comparison, pair: Pair) -> tuple[Gradient, Gradient, str]:
    """(the update's gradient, the larger batch's, when), before they are clipped if they differ there."""
    one, other = pair.update.first, pair.larger.first
    if comparison.hidden(pair) and one.before_clipping is not None and other.before_clipping is not None:
        return one.before_clipping, other.before_clipping, "before it is clipped, "
    return one.gradient, other.gradient, ""


def _tolerance(comparison: Comparison, pair: Pair) -> float:
    return max(1e-9, 4 * comparison.bound(pair))


def _cause_of(comparison: Comparison, pair: Pair, steps: int) -> Cause:
    gradient, expected, when = _gradients(comparison, pair)
    error, where = relative_error(gradient, expected)
    update, first = pair.update, pair.update.first
    tolerance = _tolerance(comparison, pair)
    clipped_error, _ = pair.error()
    hides = f"; clipping leaves {number(clipped_error)} of it" if when and clipped_error < LITTLE else ""

    def cause(source: str, reason: str, shown: str, advice: str) -> Cause:
        return Cause(source, "", f"{when}{reason}{hides}", error, shown, advice)

    early = sorted({k for k in first.clipped_after if k < len(first.micro_batches)})
    if early:
        places = ", ".join(map(str, early))
        reason = f"gradients are clipped after micro-batch {places} of {len(first.micro_batches)} too"
        return Cause("clipping by micro-batch", "", reason, error, "calls that clip were seen", CLIP_ONCE)
    if carried := _carried_over(pair, gradient, tolerance):
        return cause("carried-over gradient", carried, "least squares", "reset gradients after every step")
    shown = "least squares of the gradient on what autograd delivered for each micro-batch"
    micro_counts = micro_batch_counts(update, gradient, expected)
    if micro_counts is not None and micro_counts.explains(tolerance):
        words = counts_in_words(micro_counts, pair, steps, tolerance)
        if words is not None:
            return cause("micro-batch counts", words, shown, DIVIDE)
    if (factor := _factor(gradient, expected, tolerance)) is not None:
        reason = f"the gradient is {factor_in_words(factor, pair, steps, tolerance)}"
        if not when and first.before_clipping is not None:
            reason = f"{reason}, and was not before it was clipped"
        return cause("micro-batch counts", reason, shown, DIVIDE)
    if words := _by_group(pair, gradient, expected, steps, tolerance):
        return cause("parameter groups", words, shown, "divide the gradients of all parameters alike")
    return _coupled(comparison, pair, micro_counts is not None and micro_counts.residual > tolerance)


def _factor(gradient: Gradient, expected: Gradient, tolerance: float) -> float | None:
    fit = least_squares([expected], gradient)
    return fit.factors[0] if fit is not None and fit.residual <= tolerance else None


def _carried_over(pair: Pair, gradient: Gradient, tolerance: float) -> str | None:
    """What of the window before is in the gradient, in words."""
    first = pair.update.first
    parts = [each.gradient for each in pair.update.micro_batches]
    of_window = least_squares(parts, gradient)
    if not first.carried or of_window is None or of_window.residual <= tolerance:
        return None
    whole = least_squares([*parts, first.carried], gradient)
    if whole is None or whole.residual > tolerance:
        return None
    return f"the gradient of the window before is still in it, {whole.factors[-1]:.4g} times"


def _by_group(pair: Pair, gradient: Gradient, expected: Gradient, steps: int, tolerance: float) -> str | None:
    """The parameter groups, or parameters, whose micro-batches do not count once."""
    groups = pair.update.first.groups
    named = [(f"parameter group {k}", names) for k, names in enumerate(groups) if names]
    if len(named) < 2:
        named = []
    for choice in (named, [(name, [name]) for name in sorted(expected)]):
        texts = []
        for subject, names in choice:
            one = {name: g for name, g in gradient.items() if name in names}
            other = {name: g for name, g in expected.items() if name in names}
            if relative_error(one, other)[0] <= tolerance or not other:
                continue
            factor = _factor(one, other, tolerance)
            micro_counts = micro_batch_counts(pair.update, gradient, expected, names)
            if factor is not None:
                words = factor_in_words(factor, pair, steps, tolerance)
                texts.append(f"the gradient of {subject} is {words}")
            elif micro_counts is not None and micro_counts.explains(tolerance):
                if words := counts_in_words(micro_counts, pair, steps, tolerance):
                    texts.append(f"in {subject} {words}")
            else:
                texts = []
                break
        if texts:
            more = f" and {len(texts) - 2} more" if len(texts) > 2 else ""
            return "; ".join(texts[:2]) + more
    return None


def _coupled(comparison: Comparison, pair: Pair, independent: bool) -> Cause:
    """The cause where the larger batch's gradient is no sum of the micro-batches'."""
    error, where = pair.error()
    if modules := comparison.run[0].normalised:
        names = list(modules)
        place = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        place += f" ({', '.join(sorted(set(modules.values())))})"
        most = max(map(max, pair.update.sizes))
        reason = f"statistics over {most} of {sum(map(sum, pair.larger.sizes))} samples"
        shown = "the larger batch's gradient is no sum of the micro-batches' gradients"
        return Cause("batch statistics", place, reason, error, shown, WITHOUT_STATISTICS)
    if independent:
        reason = (
            f"the gradient is off by {number(error)} of its norm, and the larger batch's is no sum of the "
            "micro-batches': the model or the loss couples the samples of a micro-batch"
        )
        shown = "least squares of the larger batch's gradient on what autograd delivered"
        advice = "compute what couples samples on the whole window's outputs"
        return Cause("coupling", "", reason, error, shown, advice)
    reason = f"the gradient is off by {number(error)} of its norm, most at {where}"
    return Cause("unknown", "", reason, error, "", "compare the loop with one micro-batch on this window")


def _rate_cause(comparison: Comparison) -> Cause | None:
    if not comparison.other_rates:
        return None
    pair = comparison.other_rates[0]
    one, other = pair.update.first.rates, pair.larger.first.rates
    reason = f"the learning rate of update {pair.number + 1} is {one[0]:.6g} instead of {other[0]:.6g}"
    if len(one) != len(other):
        reason = f"update {pair.number + 1} has {len(one)} parameter groups instead of {len(other)}"
    rates = {p.larger_number: p.larger.first.rates for p in comparison.pairs}
    before = sum(len(update.first.micro_batches) for update in comparison.updates[: pair.number])
    # The schedule is stepped before the optimizer, or after it.
    for passes in (before + len(pair.update.first.micro_batches) - 1, before):
        expected = rates.get(passes)
        if expected is not None and expected != other and all(map(math.isclose, one, expected)):
            reason += f", that of update {passes + 1}: the schedule is stepped once a micro-batch"
            break
    else:
        if pair.number and len({tuple(p.update.first.rates) for p in comparison.pairs}) == 1:
            reason += ": it never changes"
    advice = "step the schedule once an update"
    return Cause("learning rate", "", reason, math.nan, "learning rates at the optimizer's steps", advice)


def _rank_causes(comparison: Comparison) -> Iterator[Cause]:
    for i, update in enumerate(comparison.updates):
        for r, each in enumerate(update.ranks[1:], 1):
            error, _ = relative_error(each.gradient, update.first.gradient)
            if not error <= 1e-12:
                reason = f"the gradients of ranks 0 and {r} differ by {number(error)} in update {i + 1}"
                advice = "reduce the gradients of all micro-batches over the ranks before the step"
                yield Cause("ranks differ", "", reason, error, "gradients at the optimizer's step", advice)
                return


def _own_loss_cause(comparison: Comparison) -> Cause | None:
    for pair in comparison.pairs:
        expected = pair.larger.first.own_loss_gradient
        if expected is None:
            continue
        actual = pair.larger.first.before_clipping or pair.larger.first.gradient
        error, where = relative_error(actual, expected)
        if error <= comparison.bound(pair):
            continue
        factor = _factor(actual, expected, _tolerance(comparison, pair))
        what = f"{factor:.6g} times that of loss=" if factor is not None else f"off by {number(error)}"
        reason = f"with one micro-batch the loop's own gradient is {what} (update {pair.number + 1})"
        return Cause("larger batch", "", reason, error, "the given loss on the same samples", "")
    return None


def _by_rank(pair: Pair, counts: list[float]) -> list[list[float]]:
    remaining = iter(counts)
    return [[next(remaining) for _ in sizes] for sizes in pair.update.sizes]
