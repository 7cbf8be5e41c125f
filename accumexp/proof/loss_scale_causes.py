"""Why overflows change weights, and why the loss scale is not the one that it should be, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .certificate import Cause, Check
from .overflows import CLOSE, Overflow, places_in_words
from .problem import Problem, Scaling

ONE_SCALE = "keep one scale over all windows, and update it"
AFTER_THE_STEP = "update the scale once, after the window's step"
WHOLE_WINDOW = "check the whole window's gradient on all ranks"


def loss_scale_cause(
    problem: Problem, overflows: Sequence[Overflow], failed: Sequence[Check]
) -> Cause | None:
    """The cause of the `failed` checks of overflows and of the loss scale, or None."""
    if problem.scaling is None:
        return None
    backoff = problem.scaling.backoff_factor
    names = {check.name for check in failed}
    growth = next((check for check in failed if check.name.startswith("loss scale by")), None)
    unskipped, off = [], []
    if "overflow in each micro-batch" in names:
        unskipped = [each for each in overflows if each.changed]
    if "loss scale after an overflow" in names:
        off = [each for each in overflows if _far(each.from_start, backoff)]
        off = off or [each for each in overflows if _far(each.ratio, backoff)]
    kept = [each for each in off if not _far(each.from_start, 1.0)]
    detail = growth.detail if growth is not None else ""
    never_grows = detail.startswith("1 times")
    if unskipped:
        return _unskipped(problem, unskipped, off, kept, overflows)
    if kept and never_grows and len(kept) == len(overflows):
        never = f"it is not lowered after an overflow, nor does it grow ({detail})"
        return _cause(f"the loss scale never moves: {never}", ONE_SCALE)
    if kept:
        where = places_in_words(kept, overflows)
        return _cause(f"the loss scale is not lowered after an overflow in {where}", ONE_SCALE)
    if off:
        return _cause(_moved(problem.scaling, off, overflows), AFTER_THE_STEP)
    if never_grows:
        return _cause(f"the loss scale never grows: {detail}", ONE_SCALE)
    if growth is not None:
        return _cause(f"the loss scale moves otherwise than once a window: {detail}", AFTER_THE_STEP)
    return None


def _far(ratio: float, other: float) -> bool:
    """Whether two factors of the loss scale differ by more than its measurement."""
    return abs(math.log(max(ratio, 1e-300) / other)) > CLOSE


def _unskipped(
    problem: Problem,
    unskipped: list[Overflow],
    off: list[Overflow],
    kept: list[Overflow],
    overflows: Sequence[Overflow],
) -> Cause:
    """What overflows change that are not skipped, and whether they lower the scale."""
    reason = f"an overflow in {places_in_words(unskipped, overflows)} does not skip the window"
    most = max(each.parameters for each in unskipped)
    if most:
        every = sum(p.requires_grad for p in problem.model.parameters())
        number = f"all {most}" if most == every else str(most)
        reason += f": it changes {number} parameter{'s' if most > 1 else ''}"
    if kept and len(kept) == len(overflows):
        reason += ", and none lowers the loss scale"
        gone = all(each.finite for each in unskipped)
        return _cause(reason + ("; the infinities are gone before the step" if gone else ""), WHOLE_WINDOW)
    if kept:
        reason += f"; the loss scale is not lowered after one in {places_in_words(kept, overflows)}"
    elif not off:
        reason += ", although the loss scale is lowered: the step is not the scaler's"
        return _cause(reason, f"{WHOLE_WINDOW}, and step through the scaler")
    return _cause(reason, WHOLE_WINDOW)


def _moved(scaling: Scaling, off: list[Overflow], overflows: Sequence[Overflow]) -> str:
    """How the loss scale moves where it moves, but not once a window."""
    backoff = scaling.backoff_factor
    grown = overflows[0].ratio / (overflows[0].from_start or 1.0)
    due = f"where it is due after {scaling.growth_interval} windows"
    grows = f"it grows {grown:.3g}-fold in the first window without an overflow, {due}"
    if not any(_far(each.from_start, backoff) for each in off):
        return f"the loss scale moves otherwise than once a window: {grows}"
    at_once = next(each for each in overflows if each.place is None)
    count = len({each.place[1] for each in overflows if each.place is not None})
    if at_once in off and count > 1 and not _far(at_once.from_start, backoff**count):
        times = f"{at_once.from_start:.3g} times after an overflow in all {count}, {backoff:g} is right"
        reason = f"the loss scale moves once a micro-batch, not once a window: {times}"
        return f"{reason}; {grows}" if _far(grown, 1.0) else reason
    worst = max(off, key=lambda each: abs(math.log(max(each.from_start, 1e-300) / backoff)))
    alike = [each for each in off if not _far(each.from_start, max(worst.from_start, 1e-300))]
    times = f"{worst.from_start:.3g} times after an overflow in {places_in_words(alike, overflows)}"
    return f"the loss scale moves otherwise than once a window: {times}, {backoff:g} is right"


def _cause(reason: str, advice: str) -> Cause:
    return Cause("loss scale", "", reason, math.nan, "", advice)
