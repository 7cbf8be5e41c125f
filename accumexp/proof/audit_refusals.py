"""Loops that cannot be watched or compared: one line that says why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .audit_pairs import Comparison, Levels
from .audit_records import AuditError, FitRecord
from .audit_samples import multiset
from .audit_watch import Watch
from .certificate import number

# Two runs of the larger batch that differ by more cannot be told from a wrong one.
MOST = 1e-2


def unwatchable(watch: Watch) -> str:
    """Why the run of `watch` shows nothing, in one line; "" if it shows its updates."""
    record = watch.record
    if watch.model is None:
        return "fit never called watch(model): pass the model that is trained through it"
    if not watch.calls:
        return (
            "the watched model was never called with gradients: watch the module whose forward the trainer "
            "calls, before the trainer wraps, copies or compiles it"
        )
    if not record.updates and watch.foreign_steps:
        return (
            "the optimizer that stepped holds other tensors than the watched model's parameters: the trainer "
            "flattens, shards or copies them, which the audit cannot watch"
        )
    if not record.updates:
        return "no torch optimizer of the watched model stepped: train for at least one window"
    delivered = any(each.gradient for update in record.updates for each in update.micro_batches)
    if not delivered or not any(u.gradient or u.skipped for u in record.updates):
        return "all gradients of the watched model are None when its optimizer steps"
    return ""


def level_or_refuse(
    comparison: Comparison, attempts: Sequence[tuple[str, Callable[[], list[FitRecord]]]]
) -> Levels:
    """The levels of the first of `attempts` that does not change the larger batch by more than rounding.

    Raises:
        AuditError: if all of them do.
    """
    least, reason = math.inf, ""
    for how, rerun in attempts:
        try:
            levels = comparison.measure(rerun(), how)
        except AuditError:
            raise
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if levels.gradient <= MOST:
            return levels
        least = min(least, levels.gradient) if levels.gradient == levels.gradient else least
    if math.isinf(least):
        raise AuditError(f"the loop's rounding cannot be measured: {reason or 'gradients are not finite'}")
    raise AuditError(
        f"two runs of the larger batch differ by {number(least)}, more than {MOST:g}: the audit cannot tell "
        "a wrong gradient from that; train in float64 and without draws outside the model's forward"
    )


def check_order(comparison: Comparison) -> None:
    """Raises AuditError if the two runs take the samples in another order, so that no updates match."""
    if comparison.matches or not comparison.larger_updates or not comparison.updates:
        return
    streams = [
        [sample for update in updates for sample in update.first.samples]
        for updates in (comparison.updates, comparison.larger_updates)
    ]
    shorter = min(map(len, streams))
    if comparison.ranks == 1 and streams[0][:shorter] == streams[1][:shorter]:
        return
    one, other = (multiset([stream]) for stream in streams)
    if not one & other:
        raise AuditError(
            "the model receives other samples with one micro-batch: give the trainer data that do not change "
            "between runs, without augmentation, and samples in the first dimension of every input"
        )
    first = comparison.updates[0].samples
    if not first & comparison.larger_updates[0].samples == first:
        raise AuditError(
            "the order of the samples depends on the micro-batch size: give the trainer a loader that does "
            "not shuffle"
        )


def check_pairs(comparison: Comparison) -> None:
    """Raises AuditError if all updates match, and none can be compared."""
    if comparison.pairs or any(True for _ in comparison.segments()):
        return
    total = len(comparison.updates)
    skipped = sum(update.first.skipped for update in comparison.updates)
    why = f"the loss scaler skipped {skipped} of {total}" if skipped else "none has a gradient in both runs"
    raise AuditError(f"no update could be compared: {why}")
