"""The search for the causes of a proof's failed checks, the first failing update first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from . import diagnosis, second_passes, state_causes, weight_causes
from .certificate import Cause, Check, Counts
from .evidence import Failure
from .loop_causes import loop_causes
from .loss_scale_causes import loss_scale_cause
from .overflows import Overflow
from .own_precision import OwnPrecisionReplay, failure_in_another_order
from .problem import Problem
from .replay_float64 import Float64Replay

# Checks whose failure follows from a wrong gradient or from optimizer steps in the middle of a window.
CONSEQUENCES = (
    "gradient",
    "number of updates",
    "samples",
    "optimizer",
    "parameters",
    "addition",
    "overflow",
    "resume",
    "logged loss",
)


def find_causes(
    problem: Problem,
    checks: Sequence[Check],
    windows: Sequence[Failure],
    replay: Float64Replay | None,
    own_replay: OwnPrecisionReplay | None,
    overflows: Sequence[Overflow],
    micro_batches: int,
) -> tuple[list[Cause], list[Counts]]:
    """The causes of the failed `checks`, the most important first, and counts. A collective call.

    Args:
        windows: failures in windows of their own, from the first weights.
        replay, own_replay: of the updates, in fp64 and in the run's own precision.
        overflows: windows with one, where the problem has a loss scale.
        micro_batches: of the first window.
    """
    failed = [check for check in checks if not check.passed]
    causes: list[Cause] = []
    counts: list[Counts] = []
    whole = [failure for failure in windows if not failure.window]
    replayed = replay.failure if replay is not None else None
    own_replayed = own_replay.failure if own_replay is not None else None
    # The first window, else the first update in fp64, else a smaller window or one in the own precision.
    failure = next((each for each in [*whole, replayed, *windows, own_replayed] if each is not None), None)
    if failure is None and any(check.name.startswith("gradient, ") for check in failed):
        failure = failure_in_another_order(problem)
        windows = [*windows, *([failure] if failure is not None else [])]
    if failure is not None and replayed is not None and not failure.updates:
        failure.follow(replayed)
    try:
        if failure is not None:
            causes, counts = diagnosis.diagnose(problem, failure, failure in windows)
        explained = any(cause.source not in diagnosis.UNEXPLAINED for cause in causes)
        if failure is not None and not explained:
            causes = loop_causes(problem, failure.batch) or causes
            explained = any(cause.source not in diagnosis.UNEXPLAINED for cause in causes)
        others = _other_causes(problem, failed, replay, overflows, micro_batches, explained)
        # Statistics that the first micro-batch gives all others are no micro-batch's own.
        given = {cause.where for cause in others if cause.source == state_causes.FIRST_ALONE}
        causes = [each for each in causes if each.source != "batch statistics" or each.where not in given]
        # That a stop is noticed does not tell why the gradient is wrong.
        unexplained = not explained and all(cause.source == "resume" for cause in others)
        causes = [*causes, *others] if explained or unexplained else others
    except Exception as error:
        text = f"the search for the cause failed: {type(error).__name__}: {' '.join(str(error).split())}"
        causes.append(Cause("unknown", "", text, math.nan, "", "the checks that failed stand without it"))
    return causes, counts


def _other_causes(
    problem: Problem,
    failed: Sequence[Check],
    replay: Float64Replay | None,
    overflows: Sequence[Overflow],
    micro_batches: int,
    explained: bool,
) -> list[Cause]:
    """Causes of checks that do not follow from a wrong gradient, or of all if that is not `explained`."""
    causes: list[Cause] = []
    kinds: set[str] = set()
    scales: list[Check] = []
    for check in failed:
        kind = check.name.partition(",")[0]
        if kind in kinds or (explained and kind.startswith(CONSEQUENCES)):
            continue
        kinds.add(kind)
        if explained and kind == "loss scale by update" and not (replay and replay.scale_is_measured):
            continue  # an artefact of the wrong gradient
        if kind.startswith(("overflow", "loss scale")):
            scales.append(check)
        elif kind == "buffers":
            buffers = [each for each in failed if each.name.partition(",")[0] == kind]
            causes.append(state_causes.buffers_cause(problem, buffers, micro_batches))
        elif kind == "logged loss" and replay is not None and replay.logged is not None:
            causes.append(state_causes.logged_loss_cause(problem, replay.logged))
        elif kind == second_passes.NAME:
            causes.append(second_passes.second_pass_cause(problem, check))
        elif (cause := state_causes.simple_cause(check)) is not None:
            alike = cause.reason.partition(":")[0]
            if not any(other.reason.partition(":")[0] == alike for other in causes):
                causes.append(cause)
    if cause := loss_scale_cause(problem, overflows, scales):
        causes.append(cause)
    if explained or kinds & {"state", "buffers", "learning rate"}:
        return causes
    if replay is not None and replay.changed is not None:
        causes.insert(0, weight_causes.changed_weights_cause(problem, replay.changed, micro_batches))
    causes += state_causes.low_precision_causes(problem, failed)
    return causes
