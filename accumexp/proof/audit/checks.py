"""The checks of an audit: updates, samples, gradients, weights, buffers, learning rates, losses, ranks."""

from __future__ import annotations

import math

from ..certificate import Check, Series, number, worst_check
from ..rounding import LAMBDA
from .count_wording import updates_in_words
from .counts import relative_error
from .pairs import Comparison, Pair, buffers_differ, moved_otherwise, size_over_step

# Logged losses are often rounded to four digits.
LOGGED = 1e-3
# A bound of the change of the weights above which it tells nothing.
WIDE = 0.1


def all_checks(comparison: Comparison) -> tuple[list[Check], list[Series]]:
    """The checks that have something to compare, and the gradient's figures by update."""
    gradient, series = _gradient_checks(comparison)
    checks = [
        _updates_check(comparison),
        _samples_check(comparison),
        _steps_check(comparison),
        *gradient,
        _weights_check(comparison),
        _buffers_check(comparison),
        _rates_check(comparison),
        _agreement_check(comparison) if comparison.ranks > 1 else None,
        _loss_check(comparison),
        _own_loss_check(comparison),
    ]
    return [check for check in checks if check is not None], series


def _updates_check(comparison: Comparison) -> Check:
    made, right = len(comparison.updates) - len(comparison.left_out), len(comparison.larger_updates)
    return Check(
        "number of updates",
        abs(made - right),
        0.0,
        "count",
        "one update for each of the larger batch's",
        f"{made} updates, {right} of the larger batch",
    )


def _samples_check(comparison: Comparison) -> Check:
    """Updates on other samples than the larger batch's, and samples that no update uses."""
    extra = [i for run, _ in comparison.segments() for i in run if i not in comparison.left_out]
    missing = [j for _, b in comparison.segments() for j in b]
    detail = f"{sum(comparison.never_used.values())} samples of the larger batch's updates are in none"
    if extra:
        detail += f"; first in update {extra[0] + 1}"
    figure = max(len(extra), len(missing))
    why = "every update takes the samples of one of the larger batch's"
    return Check("samples by update", figure, 0.0, "count", why, detail if figure else "")


def _steps_check(comparison: Comparison) -> Check:
    other = comparison.other_steps
    figure = max((abs(p.update.steps - p.larger.steps) for p in other), default=0)
    why = "as often as with one micro-batch"
    detail = updates_in_words([p.number for p in other]) if other else ""
    return Check("optimizer steps an update", figure, 0.0, "count", why, detail)


def _gradient_checks(comparison: Comparison) -> tuple[list[Check], list[Series]]:
    levels = comparison.levels
    lost = number(levels.gradient)
    why = f"{LAMBDA:g} times {lost}, which the larger batch loses to {levels.how}, and {LAMBDA:g} u"
    checks, numbers, figures, bounds = [], [], [], []
    for pair, error, where in comparison.errors:
        numbers.append(pair.number + 1)
        figures.append(error)
        bounds.append(comparison.bound(pair))
        detail = f"update {pair.number + 1}, most at {where}" if error else "no difference"
        checks.append(Check("gradient", error, comparison.bound(pair), "relative", why, detail))
    worst_checks = [worst_check(checks)] if checks else []
    clipped = []
    for pair in comparison.pairs:
        one, other = pair.update.first.before_clipping, pair.larger.first.before_clipping
        if one is not None and other is not None:
            error, where = relative_error(one, other)
            detail = f"update {pair.number + 1}, most at {where}" if error else "no difference"
            clipped.append(
                Check("gradient before clipping", error, comparison.bound(pair), "relative", why, detail)
            )
    if clipped:
        worst_checks.append(worst_check(clipped))
    return worst_checks, [Series("gradient", "relative", numbers, figures, bounds)] if numbers else []


def _weights_check(comparison: Comparison) -> Check | None:
    """Undecided where the bound is wide: an optimizer such as Adam turns rounding into whole steps."""
    checks = []
    bound = LAMBDA**2 * (comparison.levels.weights + comparison.unit)
    why = (
        f"{LAMBDA**2:g} times {number(comparison.levels.weights)}, as for the gradient, and {LAMBDA**2:g} u: "
        "optimizers enlarge the rounding of small elements"
    )
    for pair in comparison.pairs:
        if pair not in comparison.failing and pair.update.first.after and comparison.same_rates(pair):
            error = moved_otherwise(pair.update, pair.larger)
            limit = pair.cancellation * bound + LAMBDA * comparison.unit * size_over_step(pair.larger)
            detail = f"update {pair.number + 1}"
            decided = limit <= WIDE
            checks.append(Check("change of the weights", error, limit, "relative", why, detail, decided))
    return worst_check([c for c in checks if c.decided] or checks) if checks else None


def _buffers_check(comparison: Comparison) -> Check | None:
    checks = []
    bound = LAMBDA * (comparison.levels.buffers + comparison.unit)
    why = f"{LAMBDA:g} times {number(comparison.levels.buffers)}, as for the gradient, and {LAMBDA:g} u"
    for pair in comparison.pairs:
        error, where = buffers_differ(pair.update, pair.larger)
        if where:
            detail = f"update {pair.number + 1}, most at {where}"
            checks.append(Check("buffers", error, bound, "relative", why, detail))
    return worst_check(checks) if checks else None


def _rates_check(comparison: Comparison) -> Check | None:
    pairs = [p for p in comparison.pairs if p.number == p.larger_number and p.update.first.rates]
    if not pairs:
        return None
    figures = [_ratio(p) for p in pairs]
    at = figures.index(max(figures))
    detail = f"update {pairs[at].number + 1}" if figures[at] else "no difference"
    return Check("learning rate", figures[at], 1e-9, "log ratio", "as in the larger batch's run", detail)


def _agreement_check(comparison: Comparison) -> Check:
    checks = []
    for i, update in enumerate(comparison.updates):
        for r, each in enumerate(update.ranks[1:], 1):
            error, _ = relative_error(each.gradient, update.first.gradient)
            detail = f"update {i + 1}, rank {r}" if error else ""
            checks.append(Check("ranks agree", error, 1e-12, "relative", "the same gradient", detail))
    return worst_check(checks)


def _loss_check(comparison: Comparison) -> Check | None:
    checks = []
    for pair in comparison.pairs:
        one, other = pair.update.first.loss, pair.larger.first.loss
        if one is None or other is None:
            continue
        figure = abs(one - other) / (abs(other) or 1.0)
        detail = f"update {pair.number + 1}: {one:.6g}, the larger batch {other:.6g}"
        why = "loops often log four digits"
        checks.append(Check("logged loss", figure, LOGGED, "relative", why, detail, about="logging"))
    return worst_check(checks) if checks else None


def _own_loss_check(comparison: Comparison) -> Check | None:
    checks = []
    for pair in comparison.pairs:
        expected = pair.larger.first.own_loss_gradient
        if expected is None:
            continue
        actual = pair.larger.first.before_clipping or pair.larger.first.gradient
        error, where = relative_error(actual, expected)
        detail = f"update {pair.number + 1}, most at {where}"
        why = "the gradient of `loss=`, bounded as that of the run"
        checks.append(Check("larger batch, by loss=", error, comparison.bound(pair), "relative", why, detail))
    return worst_check(checks) if checks else None


def _ratio(pair: Pair) -> float:
    rates = zip(pair.update.first.rates, pair.larger.first.rates, strict=False)
    return max(
        (0.0 if a == b else abs(math.log(a / b)) if a > 0 and b > 0 else math.inf for a, b in rates),
        default=0.0,
    )
