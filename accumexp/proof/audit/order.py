"""Causes in when the optimizer steps, and on which samples."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..certificate import Cause
from .count_wording import listed, of_samples, updates_in_words
from .counts import least_squares
from .pairs import Comparison
from .samples import epochs_of

STEP_ONCE = "step once, after the window's last micro-batch"
TO_THE_END = "end the window with the epoch: step after its last micro-batch, whatever their number"


def step_causes(comparison: Comparison) -> Iterator[Cause]:
    if several := comparison.other_steps:
        pair = several[0]
        reason = (
            f"the optimizer steps {pair.update.steps} times at the end of "
            f"{updates_in_words([p.number for p in several])}, with one micro-batch {pair.larger.steps}"
        )
        yield Cause("optimizer steps", "", reason, math.nan, "steps were counted", STEP_ONCE)


def sample_causes(comparison: Comparison) -> list[Cause]:
    """Causes in which samples the updates take."""
    causes, over_end, extra, late, lost = [], [], [], [], 0
    epochs = epochs_of(update.samples.elements() for update in comparison.updates)
    lost_in: list[int] = []
    for run, larger in comparison.segments():
        straddling = [i for i in run if len(epochs[i]) > 1]
        for i in straddling:
            update = comparison.updates[i]
            by_micro_batch = least_squares([m.gradient for m in update.micro_batches], update.first.gradient)
            if by_micro_batch is None:
                continue
            dropped = [k for k, factor in enumerate(by_micro_batch.factors) if abs(factor) < 1e-6]
            if dropped:
                lost += sum(len(update.micro_batches[k].samples) for k in dropped)
                lost_in.append(i)
        over_end += [i for i in straddling if i not in lost_in]
        if straddling:
            continue
        if run and larger and len(run) > len(larger):
            extra.append((run, larger))
        elif len(run) < len(larger) and run:
            late.append((run, larger))
    if extra:
        run, larger = extra[0]
        sizes = [sum(map(sum, comparison.updates[i].sizes)) for i in run]
        whole = sum(sum(map(sum, comparison.larger_updates[j].sizes)) for j in larger)
        one = "one update" if len(larger) == 1 else f"{len(larger)} updates"
        total = len(comparison.updates), len(comparison.larger_updates)
        reason = (
            f"updates {run[0] + 1} to {run[-1] + 1} take {listed(sizes)} samples, where the larger batch "
            f"makes {one} of {whole}: {total[0]} updates in all instead of {total[1]}"
        )
        counted = "samples were counted by the content of the model's inputs"
        causes.append(Cause("extra updates", "", reason, math.nan, counted, STEP_ONCE))
    if over_end:
        update = comparison.updates[over_end[0]]
        reason = (
            f"{updates_in_words(over_end)} {'take' if len(over_end) > 1 else 'takes'} samples of two epochs "
            f"({of_samples(update.sizes)}): the window goes on over the epoch's end"
        )
        shown = "samples that are seen again begin another epoch"
        causes.append(Cause("windows over an epoch's end", "", reason, math.nan, shown, TO_THE_END))
    if late and not over_end:
        run, larger = late[0]
        reason = (
            f"update {run[0] + 1} takes the samples of {len(larger)} updates of the larger batch "
            f"({of_samples(comparison.updates[run[0]].sizes)})"
        )
        causes.append(Cause("late updates", "", reason, math.nan, "samples were counted", STEP_ONCE))
    causes += _unused(comparison, lost, over_end)
    return causes


def _unused(comparison: Comparison, lost: int, over_end: list[int]) -> list[Cause]:
    """Samples that never reach the optimizer, or never the model."""
    rest = sum(len(each.samples) for record in comparison.run for each in record.rest)
    unused, parts = lost + rest, []
    if unused:
        passes = sum(len(record.rest) for record in comparison.run)
        if rest:
            parts.append(f"{rest} in {passes} micro-batches after the last optimizer step")
        if lost:
            parts.append(f"{lost} whose gradient is reset before the step")
    given = sum(sum(map(sum, update.sizes)) for update in comparison.updates) + rest
    unseen = sum(comparison.never_used.values()) - rest
    if unused and (comparison.never_used or lost or over_end):
        reason = f"{unused} of {given} samples never reach the optimizer: {' and '.join(parts)}"
        return [Cause("unused samples", "", reason, math.nan, "samples were counted", TO_THE_END)]
    if unseen > 0:
        reason = f"{unseen} samples that the larger batch uses are never passed to the model"
        advice = "let the loader keep the last, smaller micro-batch"
        return [Cause("unused samples", "", reason, math.nan, "samples were counted", advice)]
    return []
