"""What the counts of a decomposed gradient mean, in words and figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from .counts import Decomposition
from .denominators import denominator_in_words
from .larger_batch import norm
from .nested import batch_size

OWN_WEIGHT = "divide every micro-batch's sum by the window's own weight"
COMPLETE = "divide or unscale the complete gradient, once"
WHOLE_GRADIENT = "the gradient"
EVERY_MICRO_BATCH = (
    "go back through every micro-batch with all parameters requiring gradients, and neither reset nor "
    "overwrite .grad before the step"
)
OF_ITS_OWN = "look for what changes this gradient alone: a hook, or a division of its own"
# The largest relative error of a count that rounding a weight to decimals is tried for, and these decimals.
ROUNDED, DECIMALS = 0.05, 4


def counts_in_words(
    parts: Decomposition, counts: Sequence[float], subject: str, whole: bool = True
) -> tuple[str, str]:
    """(what `counts` mean, what to do); `subject` is the gradient that they belong to.

    Args:
        whole: whether it is that of all parameters.
    """
    by_rank = parts.by_rank(counts)
    unseen, doubled = parts.unseen_and_doubled() if subject == WHOLE_GRADIENT and whole else ([], [])
    if unseen:
        verb = "is" if len(unseen) == 1 else "are"
        more = f", and {_numbers(doubled)} more than once" if doubled else ""
        return (
            f"of the batch's samples {_numbers(unseen)} {verb} never seen{more}",
            "let no sample of the window's batch fall away, whatever its size",
        )
    if doubled:
        verb = "is" if len(doubled) == 1 else "are"
        reason = f"of the batch's samples {_numbers(doubled)} {verb} counted more than once"
        return reason, "cut the batch into micro-batches that do not overlap"
    if parts.ranks > 1 and (unreduced := _unreduced(parts, by_rank, subject)):
        return unreduced
    ratio = _common_ratio(parts, counts)
    if ratio is None and (lost := _lost(parts, by_rank, subject)):
        return lost
    rounded = _rounded_weights(parts, counts)
    if max(counts) - min(counts) <= parts.count_tolerance * max(map(abs, counts)):
        return _uniform(parts, counts[0], subject, whole, rounded)
    if rounded:
        return (rounded if subject == WHOLE_GRADIENT else f"in {subject} {rounded}"), OWN_WEIGHT
    weights, windows, steps = parts.weights, len(counts), parts.problem.steps
    alike = [sum(weights) / (windows * weight) if weight else 0.0 for weight in weights]
    ratios = [count / a if a else 1.0 for count, a in zip(counts, alike, strict=True)]
    factor = ratios[0]
    if max(ratios) - min(ratios) <= max(1e-5, parts.count_tolerance) * max(1.0, max(map(abs, ratios))):
        what = "alike"
        if abs(factor - windows / steps) <= 1e-5 and windows != steps:
            what = f"alike, and as if there were {steps}"
        elif abs(factor - 1) > max(1e-5, parts.count_tolerance):
            what = f"alike, {factor:.4g} times"
            if abs(factor - windows) <= 1e-5 * windows:
                what += f" as the sum of {windows} means"
        reason = f"micro-batches count {what}, though they weigh {_list(weights)}: counts {_list(counts)}"
        reason = reason if subject == WHOLE_GRADIENT else f"in {subject} {reason}"
        return reason, f"{OWN_WEIGHT}, not its mean by their number"
    wrong = [k for k, count in enumerate(counts) if not parts.is_one(count)]
    if len(wrong) == 1:
        where = _micro_batches(parts, wrong)
        return f"in {subject} {where} counts {counts[wrong[0]]:.4g} times instead of once", OWN_WEIGHT
    values = {round(counts[k], 6) for k in wrong}
    if len(values) == 1 and len(wrong) < windows:
        where = _micro_batches(parts, wrong)
        return f"in {subject} {where} counts {counts[wrong[0]]:.4g} times instead of once", OWN_WEIGHT
    if ratio is not None:
        reason = f"micro-batches count {_list(counts)}: each one multiplies what .grad holds by {ratio:.4g}"
        return reason if subject == WHOLE_GRADIENT else f"in {subject} {reason}", COMPLETE
    if why := _growing_denominator(parts, counts):
        reason = f"micro-batches count {_list(counts)} of what they weigh: {why}"
        return (reason if subject == WHOLE_GRADIENT else f"in {subject} {reason}"), OWN_WEIGHT
    every = _list(counts)
    if parts.ranks > 1:
        every = "; ".join(f"rank {r}: {_list(each)}" for r, each in enumerate(by_rank))
    reason = f"micro-batches count {every} of what they weigh"
    reason = reason if subject == WHOLE_GRADIENT else f"in {subject} {reason}"
    return reason, f"{OWN_WEIGHT}, and clip the whole window's gradient"


def _common_ratio(parts: Decomposition, counts: Sequence[float]) -> float | None:
    """By what every micro-batch multiplies the gradient so far, if that explains the `counts`."""
    near = parts.count_tolerance
    if parts.ranks > 1 or len(counts) < 3 or not counts[-1] or abs(counts[-2]) <= near:
        return None
    ratio = counts[-2] / counts[-1]
    powers = [counts[-1] * ratio**k for k in reversed(range(len(counts)))]
    alike = all(abs(a - b) <= max(1e-5 * abs(b), near) for a, b in zip(counts, powers, strict=True))
    return ratio if alike and abs(ratio - 1) > near else None


def _growing_denominator(parts: Decomposition, counts: Sequence[float]) -> str:
    """What each micro-batch is divided by, where it depends on those before it, in words; "" if unknown."""
    total, near = sum(parts.weights), max(1e-5, parts.count_tolerance)
    if parts.ranks > 1 or len(counts) < 3 or not total:
        return ""
    shares = [count * weight / total for count, weight in zip(counts, parts.weights, strict=True)]
    so_far = list(itertools.accumulate(parts.weights))

    def are(values: Sequence[float]) -> bool:
        return all(abs(share - value) <= near for share, value in zip(shares, values, strict=True))

    if all(so_far) and are([weight / sum_ for weight, sum_ in zip(parts.weights, so_far, strict=True)]):
        return "each one is divided by the weight of those up to it, not by the window's"
    if are([1 / (k + 1) for k in range(len(shares))]):
        return "each one's mean is divided by the number of those up to it"
    new, last = shares[-1], len(shares) - 1
    if 0 < new < 1 and are([(new if k else 1) * (1 - new) ** (last - k) for k in range(last + 1)]):
        return f"a moving average, in which each one's mean has a weight of {new:.4g}"
    return ""


def _lost(parts: Decomposition, by_rank: list[list[float]], subject: str) -> tuple[str, str] | None:
    flat = [count for each in by_rank for count in each]
    lost = parts.lost(flat)
    if not lost or len(lost) == len(flat):
        return (f"{subject} is zero", EVERY_MICRO_BATCH) if lost else None
    left = [k for k in range(len(flat)) if k not in lost]
    factor = flat[left[0]]
    alike = all(abs(flat[k] - factor) <= parts.count_tolerance * abs(factor) for k in left)
    counted = f"{factor:.4g}" if alike else _list([flat[k] for k in left])
    times = "" if all(parts.is_one(flat[k]) for k in left) else f", {counted} times"
    where = _micro_batches(parts, lost)
    reason = f"{where} of {len(flat)} does not count"
    if len(left) == 1 and len(flat) > 2:
        which = {0: "the first", len(flat) - 1: "the last"}.get(left[0])
        which = _micro_batches(parts, left) if which is None or parts.ranks > 1 else f"{which} micro-batch"
        reason = f"only {which} of {len(flat)} counts{times}: {reason}"
    elif times:
        reason += f", and the others{times}"
    return reason if subject == WHOLE_GRADIENT else f"in {subject} {reason}", EVERY_MICRO_BATCH


def _unreduced(parts: Decomposition, by_rank: list[list[float]], subject: str) -> tuple[str, str] | None:
    """Which micro-batches' gradients stay on their own rank."""
    ranks, every = parts.ranks, parts.every_rank
    if every is None:
        return None
    stays: dict[int, list[int]] = {}
    for q in range(ranks):
        for k in range(len(by_rank[q])):
            elsewhere = [parts.by_rank(counts)[q][k] for r, counts in enumerate(every) if r != q]
            at_home = parts.by_rank(every[q])[q][k]
            if (
                all(abs(c) <= parts.count_tolerance for c in elsewhere)
                and abs(at_home) > parts.count_tolerance
            ):
                stays.setdefault(q, []).append(k)
    if not stays:
        return None
    if all(len(stays.get(q, ())) == len(by_rank[q]) for q in range(ranks)):
        return f"{subject} is not reduced over the ranks", "synchronise in the window's last micro-batch"
    texts = []
    for q, numbers in stays.items():
        kept = [k for k in range(len(by_rank[q])) if k not in numbers]
        verb = "stays" if len(numbers) == 1 else "stay"
        text = f"rank {q}'s {_named(numbers)} {verb} on it"
        if kept and max(kept) < min(numbers):
            text += f": micro-batch {max(kept)} synchronises instead of the last"
        texts.append(text)
    reason = f"in {subject} {'; '.join(texts)}" if subject != WHOLE_GRADIENT else "; ".join(texts)
    return reason, "run forward and backward of all micro-batches but the window's last in no_sync()"


def _rounded_weights(parts: Decomposition, counts: Sequence[float]) -> str:
    """Whether micro-batches count as weights rounded to a few decimals do, in words; "" if not."""
    total = sum(parts.weights)
    if not total or all(map(parts.is_one, counts)) or any(abs(count - 1) > ROUNDED for count in counts):
        return ""
    due = [weight / total for weight in parts.weights]
    made = [count * share for count, share in zip(counts, due, strict=True)]
    near = max(1e-6, parts.count_tolerance)
    for decimals in range(1, DECIMALS + 1):
        rounded = [round(share, decimals) for share in due]
        differ = any(abs(share - each) > near for share, each in zip(due, rounded, strict=True))
        if differ and all(abs(one - each) <= near for one, each in zip(made, rounded, strict=True)):
            weights = f"weights rounded to {decimals} decimal{'s' if decimals > 1 else ''}"
            if max(due) - min(due) <= near:
                of_each = f"each of {len(due)} micro-batches counts {made[0]:.6g} where {due[0]:.6g} is due"
                return f"{of_each}, as {weights} do"
            return f"micro-batches count {_list(made)} where {_list(due)} is due, as {weights} do"
    return ""


def _uniform(parts: Decomposition, count: float, subject: str, whole: bool, why: str = "") -> tuple[str, str]:
    """What a `count` of all micro-batches means; `why` if that is known."""
    steps, ranks = parts.problem.steps, parts.ranks
    windows = sum(len(each) for each in parts.micro_batches)
    per_rank = windows // ranks
    samples = batch_size(parts.failure.batch)
    divided_by_steps = f"{per_rank} micro-batches divided by {steps}"
    factors = [
        (windows / ranks, f"the sum of {per_rank} micro-batches' means instead of their mean"),
        (windows, f"the sum of {windows} micro-batches' means instead of their mean"),
        (sum(parts.weights), f"the sum over {sum(parts.weights):g} items instead of their mean"),
        (samples, f"not divided by the {samples} samples"),
        (ranks, f"added over {ranks} ranks where it should be averaged"),
        (1 / ranks, f"divided by {ranks} ranks once more"),
        (windows / (steps * ranks), divided_by_steps),
        (1 / windows, f"divided by {windows} twice"),
        (1 / steps, f"divided by {steps} twice"),
        (windows / (steps * ranks) / steps, f"divided by {steps} twice"),
        (1 / (sum(parts.weights) or 1.0), f"divided by {sum(parts.weights):g} items twice"),
    ]
    near = max(1e-6, parts.count_tolerance)
    rounded = bool(why)
    named = (text for value, text in factors if value != 1 and abs(count - value) <= near * value)
    why = why or next(named, "")
    uncommon = rounded or why == divided_by_steps
    # Other numbers of micro-batches have other sums of means; that needs no word.
    tells_others = whole and (uncommon or not why)
    others = parts.failure.other_factors(count, uncommon) if tells_others else ""
    if why == divided_by_steps and others:
        why = f"divided by steps, whatever the number of micro-batches: {why}"
    if not why:
        why = denominator_in_words(parts, count, whole)
    exponent = math.log2(abs(count) or 1.0)
    if not why and abs(exponent) >= 5 and abs(exponent - round(exponent)) <= 1e-3:
        why = f"2^{round(exponent)}, as loss scales are: it is clipped or stepped before it is unscaled"
    if subject == WHOLE_GRADIENT and whole and (clipping := _clipping(parts, count)):
        return clipping
    reason = f"{subject} is {count:.6g} times the larger batch's{others}"
    advice = "divide by the window's own weight, once" if whole or why else OF_ITS_OWN
    return (f"{reason}: {why}" if why else reason), advice


def _clipping(parts: Decomposition, count: float) -> tuple[str, str] | None:
    """What a common factor means where the larger batch's gradient is clipped."""
    clip_norm, size = parts.problem.clip_norm, parts.failure.expected.size
    observed = parts.failure.observation.gradient
    if clip_norm is None or size <= clip_norm or observed is None:
        return None
    length = norm(observed)
    if abs(length - size) <= 1e-6 * size:
        return "the gradient is not clipped", f"clip it to a norm of {clip_norm:g}"
    largest = max(float(g.abs().max()) for g in observed.values() if g.numel())
    if abs(largest - clip_norm) <= 1e-3 * clip_norm:
        reason = f"the gradient is clipped by its largest element to {clip_norm:g}, not by its 2-norm"
        return reason, "clip by the 2-norm over all parameters"
    reason = f"the gradient is clipped to a norm of {length:.4g} instead of clip_norm={clip_norm:g}"
    exponent = math.log2(clip_norm / length) if length else 0.0
    if exponent >= 5 and abs(exponent - round(exponent)) <= 0.01:
        reason += f": 2^-{round(exponent)} of it, as if clipped before a loss scale was divided out"
    if abs(count - 1 / parts.problem.steps) <= 1e-4:
        reason += f": divided by {parts.problem.steps} after it was clipped"
    return reason, "clip the complete gradient, divided and unscaled, by its norm over all parameters"


def _micro_batches(parts: Decomposition, numbers: Sequence[int]) -> str:
    """The micro-batches of these `numbers` over all ranks, named by rank if there are several."""
    if parts.ranks == 1:
        return _named(numbers)
    names, start = [], 0
    for r, each in enumerate(parts.micro_batches):
        of_rank = [k - start for k in numbers if start <= k < start + len(each)]
        if of_rank:
            names.append(f"rank {r}'s {_named(of_rank)}")
        start += len(each)
    return " and ".join(names)


def _named(numbers: Sequence[int]) -> str:
    return f"micro-batch {_numbers(numbers)}"


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:6])) + (f" and {len(values) - 6} more" if len(values) > 6 else "")


def _list(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:6])
    return f"({shown}{', ...' if len(values) > 6 else ''})"
