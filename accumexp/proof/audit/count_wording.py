"""What the counts of micro-batches mean, in words and figures."""

from __future__ import annotations

from collections.abc import Sequence

from .counts import MicroBatchCounts
from .pairs import Pair


def counts_in_words(micro_counts: MicroBatchCounts, pair: Pair, steps: int, tolerance: float) -> str | None:
    """What `micro_counts` means; None if every micro-batch counts once."""
    counts, near = micro_counts.counts, max(1e-6, tolerance)
    if all(abs(count - 1) <= near for count in counts):
        return None
    if max(counts) - min(counts) <= near * max(map(abs, counts)):
        return f"the gradient is {factor_in_words(counts[0], pair, steps, tolerance)}"
    sizes = pair.update.sizes
    if words := _lost(counts, pair, near):
        return words
    text = f"{of_samples(sizes)} count {listed(counts)} times"
    added = [factor for factor in micro_counts.added if factor == factor]
    if max(added) - min(added) > near * max(map(abs, added)) or not all(count > 0 for count in counts):
        return f"{text}: what autograd delivered is added {listed(added)} times"
    # Micro-batches that count alike count 1 over their weight, whose mean is 1.
    factor = len(counts) / sum(1 / count for count in counts)
    weights = [factor / count for count in counts]
    flat = [size for each in sizes for size in each]
    by_samples = [size * len(flat) / sum(flat) for size in flat]
    why = f"though they weigh {listed(weights)} in the larger batch, as their items that count"
    if all(abs(w - s) <= near * len(flat) for w, s in zip(weights, by_samples, strict=True)):
        why = "whatever their number of samples"
    elif len(set(flat)) > 1:
        why = f"though they weigh {listed(weights)} in the larger batch"
    alike = "the micro-batches' means count alike"
    if abs(factor - 1) > near:
        alike += f", {factor:.4g} times as much{_why(factor, pair, steps, near)}"
    return f"{text}: {alike}, {why}"


def _lost(counts: Sequence[float], pair: Pair, near: float) -> str | None:
    lost = [k for k, count in enumerate(counts) if abs(count) <= near]
    if not lost or len(lost) == len(counts):
        return None
    flat = [(r, k) for r, sizes in enumerate(pair.update.sizes) for k in range(len(sizes))]
    ranks = len(pair.update.sizes)
    names = ", ".join(f"{k}" if ranks == 1 else f"{k} of rank {r}" for r, k in (flat[i] for i in lost))
    others = [count for k, count in enumerate(counts) if k not in lost]
    text = f"micro-batch {names} of {len(pair.update.sizes[0])} does not count"
    if any(abs(count - 1) > near for count in others):
        text += f", and the others count {listed(others)} times"
    return text


def factor_in_words(factor: float, pair: Pair, steps: int, tolerance: float) -> str:
    """`factor` of the whole gradient and what it comes from."""
    return f"{factor:.6g} times the larger batch's{_why(factor, pair, steps, max(1e-6, tolerance))}"


def _why(factor: float, pair: Pair, steps: int, near: float) -> str:
    passes, ranks = len(pair.update.sizes[0]), len(pair.update.sizes)
    samples = sum(map(sum, pair.update.sizes))
    reasons = [
        (passes, f"the means of {passes} micro-batches are added and not divided by their number"),
        (passes / steps, f"{passes} micro-batch{'es are' if passes > 1 else ' is'} divided by {steps}"),
        (1 / passes, f"divided by {passes} twice"),
        (1 / steps, f"divided by {steps} twice"),
        (ranks, f"added over {ranks} ranks and not averaged"),
        (1 / ranks, f"divided by {ranks} ranks twice"),
        (passes * ranks, f"the means of {passes * ranks} micro-batches are added"),
        (samples, f"a sum over {samples} samples"),
    ]
    for value, text in reasons:
        if value != 1 and abs(factor - value) <= near * value:
            return f": {text}"
    return ""


def of_samples(sizes: list[list[int]]) -> str:
    """The micro-batches of an update, by rank."""
    if len(sizes) == 1:
        return f"micro-batches of {listed(sizes[0])} samples"
    texts = [f"{listed(each)} on rank {r}" for r, each in enumerate(sizes)]
    return f"micro-batches of {' and '.join(texts)}"


def listed(values: Sequence[float]) -> str:
    """Numbers as "8, 8, 8 and 2"."""
    shown = [f"{value:.5g}" for value in values[:8]]
    if len(values) > 8:
        return ", ".join(shown) + ", ..."
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def updates_in_words(numbers: list[int]) -> str:
    shown = ", ".join(str(i + 1) for i in numbers[:6])
    more = f" and {len(numbers) - 6} more" if len(numbers) > 6 else ""
    return f"update{'s' if len(numbers) > 1 else ''} {shown}{more}"
