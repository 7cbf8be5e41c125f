"""Why a run's updates are not the larger batch's: order of steps and samples, counts, learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .audit_counts import least_squares, micro_batch_counts, relative_error
from .audit_order import sample_causes, step_causes
from .audit_pairs import Comparison, Pair
from .audit_words import counts_in_words, factor_in_words, updates_in_words
from .certificate import Cause, Counts, number
from .diagnosis import WITHOUT_STATISTICS
from .larger_batch import Gradient

DIVIDE = "divide every micro-batch's sum by the weight of the whole window, once"
CLIP_ONCE = "clip once, after the window's last micro-batch"


def find_causes(comparison: Comparison, steps: int) -> tuple[list[Cause], list[Counts]]:
    """The causes of failed checks, the most important one first, and counts of micro-batches."""
    causes = [*step_causes(comparison), *sample_causes(comparison)]
    of_gradients, counts = _gradient_causes(comparison, steps)
    causes += of_gradients
    causes += _before_clipping_causes(comparison, steps, bool(of_gradients))
    if cause := _rate_cause(comparison, steps):
        causes.append(cause)
    causes += _rank_causes(comparison)
    if cause := _own_loss_cause(comparison):
        causes.append(cause)
    return causes, counts


def _gradient_causes(comparison: Comparison, steps: int) -> tuple[list[Cause], list[Counts]]:
    causes: list[Cause] = []
    counts: list[Counts] = []
    seen: set[str] = set()
    explained = [pair for pair in comparison.pairs if pair not in comparison.failing][:1]
    for pair in [*explained, *comparison.failing]:
        found = micro_batch_counts(pair.update, pair.larger.first.gradient)
        if found is not None and found.residual <= _tolerance(comparison, pair):
            if len(counts) < 8:
                counts.append(Counts(f"update {pair.number + 1}", _by_rank(pair, found.counts)))
    for pair in comparison.failing:
        cause = _cause_of(comparison, pair, steps)
        if cause.source in seen:
            continue
        seen.add(cause.source)
        alike = [p.number for p in comparison.failing if p.update.sizes == pair.update.sizes]
        causes.append(_when(comparison, cause, alike))
    return causes, counts


def _when(comparison: Comparison, cause: Cause, numbers: list[int]) -> Cause:
    total = len(comparison.pairs)
    when = "" if len(numbers) == total else f"in {updates_in_words(numbers)} of {len(comparison.updates)} "
    return Cause(cause.source, cause.where, when + cause.reason, cause.effect, cause.shown, cause.advice)


def _tolerance(comparison: Comparison, pair: Pair) -> float:
    return max(1e-9, 4 * comparison.bound(pair))


def _cause_of(comparison: Comparison, pair: Pair, steps: int) -> Cause:
    error, where = pair.error()
    update, expected = pair.update, pair.larger.first.gradient
    tolerance = _tolerance(comparison, pair)

    def cause(source: str, reason: str, shown: str, advice: str) -> Cause:
        return Cause(source, "", reason, error, shown, advice)

    if not update.first.gradient:
        return cause("no gradient", "the optimizer receives no gradient", "", DIVIDE)
    early = sorted({k for k in update.first.clipped_after if k < len(update.first.micro_batches)})
    if early:
        places = ", ".join(map(str, early))
        reason = f"gradients are clipped after micro-batch {places} of {len(update.first.micro_batches)} too"
        return cause("clipping by micro-batch", reason, "calls that clip were observed", CLIP_ONCE)
    if carried := _carried_over(pair, tolerance):
        return cause("carried-over gradient", carried, "least squares", "reset gradients after every step")
    shown = "least squares of the gradient on what autograd delivered for each micro-batch"
    found = micro_batch_counts(update, expected)
    if found is not None and found.residual <= tolerance:
        words = counts_in_words(found, pair, steps, tolerance)
        if words is not None:
            return cause("micro-batch counts", words, shown, DIVIDE)
    if (factor := _factor(update.first.gradient, expected, tolerance)) is not None:
        reason = f"the gradient is {factor_in_words(factor, pair, steps, tolerance)}"
        return cause("micro-batch counts", reason, shown, DIVIDE)
    if words := _by_group(pair, steps, tolerance):
        return cause("parameter groups", words, shown, "divide the gradients of all parameters alike")
    return _coupled(comparison, pair, found is not None and found.residual > tolerance)


def _factor(gradient: Gradient, expected: Gradient, tolerance: float) -> float | None:
    found = least_squares([expected], gradient)
    return found.factors[0] if found is not None and found.residual <= tolerance else None


def _carried_over(pair: Pair, tolerance: float) -> str | None:
    """What of the window before is in the gradient, in words."""
    first = pair.update.first
    parts = [each.gradient for each in pair.update.micro_batches]
    own = least_squares(parts, first.gradient)
    if not first.carried or own is None or own.residual <= tolerance:
        return None
    whole = least_squares([*parts, first.carried], first.gradient)
    if whole is None or whole.residual > tolerance:
        return None
    return f"the gradient of the window before is still in it, {whole.factors[-1]:.4g} times"


def _by_group(pair: Pair, steps: int, tolerance: float) -> str | None:
    """The parameter groups, or parameters, whose micro-batches do not count once."""
    groups = pair.update.first.groups
    named = [(f"parameter group {k}", names) for k, names in enumerate(groups) if names]
    if len(named) < 2:
        named = []
    for choice in (named, [(name, [name]) for name in sorted(pair.larger.first.gradient)]):
        texts = []
        for subject, names in choice:
            one = {name: g for name, g in pair.update.first.gradient.items() if name in names}
            other = {name: g for name, g in pair.larger.first.gradient.items() if name in names}
            if relative_error(one, other)[0] <= tolerance or not other:
                continue
            factor = _factor(one, other, tolerance)
            found = micro_batch_counts(pair.update, pair.larger.first.gradient, names)
            if factor is not None:
                words = factor_in_words(factor, pair, steps, tolerance)
                texts.append(f"the gradient of {subject} is {words}")
            elif found is not None and found.residual <= tolerance:
                if words := counts_in_words(found, pair, steps, tolerance):
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


def _before_clipping_causes(comparison: Comparison, steps: int, known: bool) -> Iterator[Cause]:
    """A wrong gradient that clipping hides."""
    for pair in () if known else comparison.pairs:
        one, other = pair.update.first.before_clipping, pair.larger.first.before_clipping
        if one is None or other is None:
            continue
        error, where = relative_error(one, other)
        tolerance = _tolerance(comparison, pair)
        if error <= comparison.bound(pair):
            continue
        factor = _factor(one, other, tolerance)
        what = f"off by {number(error)} of its norm, most at {where}"
        if factor is not None:
            what = factor_in_words(factor, pair, steps, tolerance)
        reason = (
            f"before it is clipped, the gradient is {what}; clipping hides it in update {pair.number + 1}"
        )
        yield Cause("micro-batch counts", "", reason, error, "gradients were recorded when clipped", DIVIDE)
        return


def _rate_cause(comparison: Comparison, steps: int) -> Cause | None:
    if not comparison.other_rates:
        return None
    pair = comparison.other_rates[0]
    one, other = pair.update.first.rates, pair.larger.first.rates
    reason = f"the learning rate of update {pair.number + 1} is {one[0]:.6g} instead of {other[0]:.6g}"
    if len(one) != len(other):
        reason = f"update {pair.number + 1} has {len(one)} parameter groups instead of {len(other)}"
    by_number = {p.larger_number: p.larger.first.rates for p in comparison.pairs}
    passes = _passes_before(comparison, pair.number)
    expected = by_number.get(passes)
    if expected is not None and expected != other and all(map(math.isclose, one, expected)):
        reason += f", that of update {passes + 1}: the schedule is stepped once a micro-batch"
    elif pair.number and len(set(map(tuple, (p.update.first.rates for p in comparison.pairs)))) == 1:
        reason += ": it never changes"
    advice = "step the schedule once an update"
    return Cause("learning rate", "", reason, math.nan, "learning rates at the optimizer's steps", advice)


def _passes_before(comparison: Comparison, index: int) -> int:
    return sum(len(update.first.micro_batches) for update in comparison.updates[:index])


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
