"""The search for the causes of a proof's failed checks, the first failing update first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import state_causes
from .certificate import Cause, Check, Counts
from .diagnosis import diagnose
from .evidence import Failure
from .loop_causes import loop_causes
from .outside import passes_of

if TYPE_CHECKING:
    from .checks import Proof

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
)


def find_causes(proof: Proof) -> tuple[list[Cause], list[Counts]]:
    """The causes of the failed checks of `proof`, the most important first. A collective call."""
    failed = [check for check in proof.checks if not check.passed]
    causes: list[Cause] = []
    counts: list[Counts] = []
    failure = first_failure(proof)
    try:
        if failure is not None:
            causes, counts = diagnose(proof.problem, failure, failure in proof.windows)
        explained = any(cause.source != "unknown" for cause in causes)
        if failure is not None and not explained:
            causes = loop_causes(proof.problem, failure.batch) or causes
            explained = any(cause.source != "unknown" for cause in causes)
        others = _other_causes(proof, failed, explained)
        causes = [*causes, *others] if explained or not others else others
    except Exception as error:
        text = f"the search for the cause failed: {type(error).__name__}: {' '.join(str(error).split())}"
        causes.append(Cause("unknown", "", text, math.nan, "", "the checks that failed stand without it"))
    return causes, counts


def first_failure(proof: Proof) -> Failure | None:
    """The first window if it fails; else the first update in fp64, a smaller window, or one in the run's
    own precision."""
    whole = [failure for failure in proof.windows if not failure.window]
    replayed = proof.replay.failure if proof.replay is not None else None
    own = proof.own_replay.failure if proof.own_replay is not None else None
    return next((each for each in [*whole, replayed, *proof.windows, own] if each is not None), None)


def _other_causes(proof: Proof, failed: list[Check], explained: bool) -> list[Cause]:
    """Causes of checks that do not follow from a wrong gradient."""
    problem, replay = proof.problem, proof.replay
    passes = passes_of(proof.first, proof.batch(0))
    causes: list[Cause] = []
    if not explained:
        wrong_rate = any(check.name.startswith("learning rate") for check in failed)
        if replay is not None and replay.changed is not None and not wrong_rate:
            causes.append(state_causes.changed_weights_cause(replay.changed, passes))
        causes += state_causes.low_precision_causes(problem, failed)
    kinds: set[str] = set()
    for check in failed:
        kind = check.name.partition(",")[0]
        if kind in kinds or (explained and kind.startswith(CONSEQUENCES)):
            continue
        kinds.add(kind)
        if kind == "buffers":
            causes.append(state_causes.buffers_cause(problem, check, passes))
        elif kind == "logged loss" and replay is not None and replay.logged is not None:
            causes.append(state_causes.logged_loss_cause(problem, replay.logged, check))
        elif (cause := state_causes.simple_cause(problem, check)) is not None:
            causes.append(cause)
    return causes
