"""Why the first update that fails is not the larger batch's, by experiments on it.

The order is that of what a mistake would hide: optimizer steps, samples, counts of the micro-batches, other
terms, and what couples samples.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from .additivity import loss_average
from .certificate import Cause, Counts, number
from .counts import Decomposition, decompose
from .coupling import NEGLIGIBLE, coupling_modules, loss_couples, whole_batch_outputs
from .evidence import Failure
from .float64 import DOUBLE
from .gradients import compare_window
from .problem import Problem, copy_in
from .ranks import all_gather
from .rounding import larger_batch_of, norms_of_errors
from .terms import clipped_inside, term_cause
from .wording import counts_in_words

WITHOUT_STATISTICS = (
    "take a norm without statistics over samples (GroupNorm), or over groups that both share "
    "(ghost batch norm), or freeze the statistics"
)
WHOLE_WINDOW_LOSS = (
    "compute the loss on all outputs of the window at once, then go back through the micro-batches "
    "(Gao et al., arXiv 2101.06983)"
)
WHOLE_WINDOW_OUTPUT = (
    "return what it is computed from, a row for each sample, and compute it in the loss on all outputs of "
    "the window at once"
)
# Subjects that are named one by one; more are counted.
NAMED = 3


def diagnose(problem: Problem, failure: Failure, first_window: bool) -> tuple[list[Cause], list[Counts]]:
    """The causes of a gradient error, and how often each micro-batch counts in it. A collective call.

    Args:
        first_window: whether the failure is in a window from the first weights, which can be repeated.
    """
    if cause := _steps_cause(problem, failure):
        return [cause], []
    causes: list[Cause] = []
    if first_window and (cause := _unrepeatable(problem, failure)):
        causes.append(cause)
    parts = decompose(problem, failure)
    found, counts = _counts_causes(problem, failure, parts) if parts is not None else ([], [])
    if found and (average := _additivity_cause(problem, failure)):
        found = [average]
    causes += found
    if not found and not failure.precision:
        causes += _coupled(problem, failure) + _coupling_loss(problem, failure)
    return (causes or [_unexplained(failure, parts)]), counts


def _cause(failure: Failure, source: str, reason: str, shown: str, advice: str) -> Cause:
    when = failure.when
    if failure.precision:
        when = f"{when}, {failure.precision}" if when else f"in {failure.precision}"
    reason = f"{reason}, {when}" if when else reason
    return Cause(source, "", reason, failure.comparison.error, shown, advice)


def _steps_cause(problem: Problem, failure: Failure) -> Cause | None:
    """The cause if the optimizer is not stepped exactly once, at the window's end."""
    every = all_gather(
        (failure.observation.steps, failure.observation.passes_before_step, len(failure.observation.sizes))
    )
    for rank, (steps, before, passes) in enumerate(every):
        of_rank = f"rank {rank}'s" if len(every) > 1 else "the"
        early = [count for count in before if count < passes]
        if steps == 1 and not (early and early[0]):
            continue
        if not steps:
            return _cause(
                failure, "no update", "the optimizer was not stepped in the window", "", "step it once"
            )
        if steps == 1:
            left = ", ".join(map(str, range(early[0], passes)))
            reason = (
                f"{of_rank} optimizer steps after {early[0]} of {passes} micro-batches: micro-batch {left} "
                "does not count in it"
            )
        elif len(set(before)) == 1:
            reason = f"{of_rank} optimizer steps {steps} times at the end of the window"
        else:
            places = ", ".join(map(str, before[:6])) + (", ..." if len(before) > 6 else "")
            times = f"{of_rank} optimizer steps {steps} times in the window"
            reason = f"{times}: after micro-batch {places} of {passes}"
        advice = "step it once, after the window's last micro-batch"
        return _cause(failure, "optimizer steps", reason, "", advice)
    return None


def _counts_causes(
    problem: Problem, failure: Failure, parts: Decomposition
) -> tuple[list[Cause], list[Counts]]:
    """Causes by micro-batch: of the whole gradient, else of each parameter group, else of each parameter."""
    if failure.observation.moved_before and problem.perturb is None:
        passes, factor = failure.observation.moved_before, failure.observation.moved_by
        times = f" are multiplied by {factor:.6g}" if factor is not None else " change"
        reason = f"the weights{times} within the window, before micro-batch {', '.join(map(str, passes[:6]))}"
        advice = "change weights once, after the window's last micro-batch"
        return [_cause(failure, "weights", reason, "", advice)], []
    counts: list[Counts] = []
    causes: list[Cause] = []
    for subjects in _levels(problem, failure, parts):
        reasons: dict[tuple[str, str], list[str]] = {}
        unexplained = False
        for subject, names in subjects.items():
            reason, counted = _explained(problem, parts, names)
            if counted is not None and len(counts) < NAMED:
                counts.append(Counts(", ".join(filter(None, (failure.when, subject))), counted))
            if reason is None:
                unexplained = True
            elif reason[0]:
                reasons.setdefault(reason, []).append(subject)
        causes = [_counts_cause(failure, *reason, names) for reason, names in reasons.items()]
        if not unexplained:
            break
    else:
        if causes:
            causes.append(_unexplained(failure, parts))
    # The first rank's causes for all: ranks with other gradients would read them differently.
    return all_gather((causes, counts))[0]


def _counts_cause(failure: Failure, reason: str, advice: str, subjects: list[str]) -> Cause:
    if subjects != [""]:
        subject = _subject(subjects)
        changed = reason.replace("the gradient", subject, 1)
        reason = f"{subject}: {reason}" if changed == reason else changed
    shown = "the micro-batches' own gradients times those counts, and such terms, leave nothing of it"
    return _cause(failure, "wrong denominator", reason, shown, advice)


def _levels(problem: Problem, failure: Failure, parts: Decomposition) -> list[dict[str, list[str]]]:
    """The subjects that are explained one by one: all of it; parameter groups; parameters that differ."""
    levels = [{"": list(parts.gradient)}]
    groups = parameter_groups(problem, failure)
    if len(groups) > 1:
        levels.append({f"parameter group {k}": names for k, names in enumerate(groups) if names})
    gradient = failure.observation.gradient
    assert gradient is not None
    errors, bounds = norms_of_errors(gradient, failure.expected.gradient), failure.expected.bounds
    differing = set().union(
        *all_gather({name for name in parts.gradient if not errors[name] <= bounds[name]})
    )
    levels.append({name: [name] for name in parts.gradient if name in differing})
    return levels


def parameter_groups(problem: Problem, failure: Failure) -> list[list[str]]:
    """The names of the parameters in each of the optimizer's groups."""
    model = copy.deepcopy(failure.model)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = problem.optimizer(list(model.parameters()))
    observed = failure.observation.gradient or {}
    grouped = [[names[id(p)] for p in group["params"] if id(p) in names] for group in optimizer.param_groups]
    return [[name for name in group if name in observed] for group in grouped]


def _explained(
    problem: Problem, parts: Decomposition, names: list[str]
) -> tuple[tuple[str, str] | None, list[list[float]] | None]:
    """(reason and advice, counts by rank) for the gradient of the parameters `names`.

    The reason is "" if the gradient is right; None instead of the pair if nothing explains it.
    """
    fit = parts.fit(names)
    every = all_gather(None if fit is None else fit.counts)
    complete = [counts for counts in every if counts is not None]
    if len(complete) == len(every):
        parts.every_rank = complete
        wrong = next((c for c in complete if not all(map(parts.is_one, c))), complete[0])
        unseen, doubled = parts.unseen_and_doubled()
        if all(map(parts.is_one, wrong)) and not unseen and not doubled:
            return ("", ""), parts.by_rank(wrong)
        if clipping := all_gather(clipped_inside(problem, parts, names))[0]:
            return clipping, parts.by_rank(wrong)
        return counts_in_words(parts, wrong, "the gradient"), parts.by_rank(wrong)
    return all_gather(term_cause(problem, parts, names))[0], None


def _subject(names: list[str]) -> str:
    if len(names) <= NAMED:
        listed = ", ".join(names)
    else:
        listed = f"{', '.join(names[:2])}, ... {names[-1]} ({len(names)} parameters)"
    return f"the gradient of {listed}"


def _additivity_cause(problem: Problem, failure: Failure) -> Cause | None:
    """The cause if the loss is a mean over something else than samples, which `certify` was not told."""
    if hasattr(problem.loss, "weight") and hasattr(problem.loss, "total"):
        return None
    outputs = larger_batch_of(problem, copy_in(problem.model, DOUBLE), failure.batch).outputs
    average = loss_average(problem.loss, outputs, failure.batch[1])
    if average is None:
        return None
    reason = (
        f"your loss averages over {average.description}, not over {average.samples} samples, and the loop "
        "weighs micro-batches as if it did"
    )
    advice = (
        "give the loss `weight(targets)` and `total(outputs, targets)`, and divide by the window's weight"
    )
    return _cause(failure, "wrong denominator", reason, "measured on parts of the batch", advice)


def _coupled(problem: Problem, failure: Failure) -> list[Cause]:
    batch = failure.batch
    couplings = coupling_modules(problem, batch)
    if not couplings:
        return []
    model = copy.deepcopy(problem.model)
    for coupling in couplings:
        model.get_submodule("" if coupling.name == "(model)" else coupling.name).eval()
    in_eval, _, _ = compare_window(replace(problem, model=model), batch)
    error = failure.comparison.error
    effect = f"in eval mode the gradient's error falls from {error:.2g} to {in_eval.error:.2g}"
    if not in_eval.equal:
        effect = f"in eval mode an error of {in_eval.error:.2g} is left of {error:.2g}"
    most = max((size for sizes in all_gather(failure.observation.sizes) for size in sizes), default=0)
    causes = []
    for kind in dict.fromkeys(coupling.kind for coupling in couplings):
        same_kind = [coupling for coupling in couplings if coupling.kind == kind]
        names = [coupling.name for coupling in same_kind]
        where = ", ".join(names)
        if len(names) > 3:
            where = f"{names[0]}, {names[1]}, ... {names[-1]}: {len(names)} modules"
        where += f" ({kind})"
        reason = f"statistics over {most} of {problem.samples} samples"
        shown = f"its output on half the batch is off by {max(c.effect for c in same_kind):.2g}; {effect}"
        causes.append(Cause("batch statistics", where, reason, error, shown, WITHOUT_STATISTICS))
    return causes


def _coupling_loss(problem: Problem, failure: Failure) -> list[Cause]:
    batch, error = failure.batch, failure.comparison.error
    if outputs := whole_batch_outputs(problem, batch):
        name = type(problem.model).__name__
        return [
            Cause(
                "coupling output",
                f"(model) ({name}), output{' and output'.join(outputs)}",
                "couples samples: a value of the whole micro-batch, not of each sample, enters the loss",
                error,
                "the loss's gradient at it is not 0",
                WHOLE_WINDOW_OUTPUT,
            )
        ]
    effect = loss_couples(problem, batch)
    if not effect > NEGLIGIBLE:
        return []
    name = getattr(problem.loss, "__name__", type(problem.loss).__name__)
    reason = "couples samples: a sample's term depends on the other samples of its micro-batch"
    shown = f"the gradient at one half's outputs moves by {effect:.2g} when only the other half's change"
    return [Cause("coupling loss", f"loss ({name})", reason, error, shown, WHOLE_WINDOW_LOSS)]


def _unrepeatable(problem: Problem, failure: Failure) -> Cause | None:
    """The cause if the same window gives another gradient when it is repeated."""
    error = failure.comparison.error
    repeated, _, _ = compare_window(problem, failure.batch)
    if not abs(repeated.error - error) > 1e-3 * error:
        return None
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic, _, _ = compare_window(problem, failure.batch)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    reason = "the same window gives another gradient each time"
    if not deterministic.equal:
        reason += ": the loop draws from a generator of its own"
        shown = "with deterministic kernels too: something draws that torch's default generator does not seed"
        advice = "draw with torch's default generator, which can be seeded"
        return Cause("unrepeatable", "", reason, error, shown, advice)
    shown = f"with deterministic kernels the error falls from {error:.2g} to {deterministic.error:.2g}"
    advice = "torch.use_deterministic_algorithms(True), or accept what two runs of the larger batch differ by"
    return Cause("non-deterministic kernels", "", reason, error, shown, advice, excused=True)


def _unexplained(failure: Failure, parts: Decomposition | None) -> Cause:
    """Says where, when and how much, where no experiment says why."""
    worst = failure.comparison
    passes = "" if parts is not None else ", and passes rows to the model that are not in the batch"
    reason = (
        f"no experiment explains the gradient{passes}: it is off by {number(worst.error)} of its norm, most "
        f"at {worst.name} ({number(worst.figure)} where rounding makes at most {number(worst.bound)})"
    )
    advice = "compare the loop with the larger batch on this window, from these weights"
    return _cause(failure, "unknown", reason, "", advice)
