"""One certificate of the comparisons of an audit."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..certificate import Cause, Certificate, Check, Counts, Series, worst_check
from ..draw_causes import REDRAWN
from .count_wording import listed
from .pairs import Comparison
from .records import FitRecord
from .runs import Result, Runs

# A comparison, and the number of micro-batches in its epochs if the audit chose it, else 0.
OfEpoch = tuple[int, Result]


def joined_certificate(results: Sequence[OfEpoch], runs: Runs) -> Certificate:
    """One certificate of comparisons on epochs of several sizes."""
    checks: dict[str, list[tuple[int, Check]]] = {}
    causes: dict[str, list[tuple[int, Cause]]] = {}
    series: list[Series] = []
    counts: list[Counts] = []
    notes: list[str] = []
    for epoch, result in results:
        for check in result.checks:
            checks.setdefault(check.name, []).append((epoch, check))
        for cause in result.causes:
            causes.setdefault(cause.source, []).append((epoch, cause))
        where = f", {_with_epochs([epoch], runs.steps)}" if epoch else ""
        series += [replace(each, name=each.name + where) for each in result.series]
        counts += [replace(each, where=each.where + where) for each in result.counts]
        notes += [note for note in _notes(result.comparison) if note not in notes]
    shown = next((result for _, result in results if result.causes), results[0][1])
    return Certificate(
        [_worst(each, runs.steps) for each in checks.values()],
        [
            *(_in_epochs(each, len(results), runs.steps) for each in causes.values()),
            *_draw_causes(shown.comparison.run[0]),
        ],
        _subject(shown.comparison, runs),
        {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
        },
        series=series,
        counts=counts,
        notes=notes,
    )


def _subject(comparison: Comparison, runs: Runs) -> dict[str, Any]:
    """What was audited, and what its updates were."""
    record, updates = comparison.run[0], comparison.updates
    name = getattr(runs.fit, "__qualname__", type(runs.fit).__name__)
    return {
        "fit": f"{runs.fit.__module__}.{name}",
        "samples": runs.steps * runs.micro * comparison.ranks,
        "steps": runs.steps,
        "ranks": comparison.ranks,
        "micro_batch_size": runs.micro,
        "precision": ", ".join(sorted(record.dtypes)),
        "parameters": record.parameters,
        "model": record.model,
        "seed": runs.seed,
        "updates": len(updates),
        "updates_of_larger_batch": len(comparison.larger_updates),
        "micro_batches_by_update": [update.sizes for update in updates],
        "samples_by_update": [sum(map(sum, update.sizes)) for update in updates],
        "samples_never_used": sum(comparison.never_used.values()),
        "learning_rates": [update.first.rates for update in updates],
        "logged_losses": [update.first.loss for update in updates],
    }


def _worst(checks: Sequence[tuple[int, Check]], steps: int) -> Check:
    """The worst of the same check on several epochs, which it names if it fails."""
    decided = [check for _, check in checks if check.decided]
    check = worst_check(decided or [check for _, check in checks])
    epoch = next(epoch for epoch, other in checks if other is check)
    if check.passed or not epoch:
        return check
    return replace(check, detail=", ".join(filter(None, (check.detail, _with_epochs([epoch], steps)))))


def _in_epochs(causes: Sequence[tuple[int, Cause]], results: int, steps: int) -> Cause:
    """The first of the same cause on several epochs, with those that show it if others do not."""
    epoch, cause = causes[0]
    if len(causes) == results or not epoch:
        return cause
    return replace(cause, reason=f"{cause.reason}; {_with_epochs([epoch for epoch, _ in causes], steps)}")


def _with_epochs(epochs: Sequence[int], steps: int) -> str:
    rest = listed([epoch % steps for epoch in epochs])
    return f"with {listed(epochs)} micro-batches an epoch ({rest} left over)"


def _draw_causes(record: FitRecord) -> list[Cause]:
    """The draws of the model: excused where they were held fixed by sample."""
    if not record.drawing:
        return []
    names = sorted(record.drawing)
    where = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    operators = {operator for each in record.drawing.values() for operator in each}
    source = "dropout draws" if any("dropout" in name or "bernoulli" in name for name in operators) else ""
    if record.unfixed:
        reason = f"draws of {', '.join(sorted(record.unfixed))} cannot be held fixed by sample"
        advice = "leave these draws out for the audit"
        return [Cause("random draws", where, reason, math.nan, "", advice)]
    reason = "random draws depend on how the batch is split"
    shown = "all gradients were compared with the same draws for every sample"
    return [Cause(source or "random draws", where, reason, math.nan, shown, REDRAWN, excused=True)]


def _notes(comparison: Comparison) -> list[str]:
    """What a reader of the verdict must know beside it."""
    notes = []
    if comparison.left_out:
        count = sum(sum(map(sum, comparison.updates[i].sizes)) for i in comparison.left_out)
        notes.append(
            f"{count} samples are in updates of which the larger batch has none, because the loader leaves "
            "out incomplete batches: these updates were not judged"
        )
    rest = sum(len(each.samples) for record in comparison.larger for each in record.rest)
    if rest:
        notes.append(f"{rest} samples reach no optimizer step with one micro-batch either")
    skipped = sum(update.first.skipped for update in comparison.updates)
    if skipped:
        notes.append(f"{skipped} updates that the loss scaler skipped were not compared")
    kept = sum(bool(update.first.before) for update in comparison.updates)
    if kept < len(comparison.updates):
        notes.append(f"gradients were compared in the first {kept} of {len(comparison.updates)} updates")
    return notes
