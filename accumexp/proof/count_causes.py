"""Causes by micro-batch: how much each counts in the whole gradient, a parameter group's or a parameter's."""

from __future__ import annotations

import copy
from dataclasses import replace

from .certificate import Cause, Counts
from .count_wording import WHOLE_GRADIENT, counts_in_words
from .counts import Decomposition, decompose
from .evidence import Failure
from .extra_terms import clipping_in_words, term_in_words
from .loss_items import has_samples, ignore_index_of, leaves, likely_counts
from .nested import batch_size
from .problem import Problem
from .ranks import all_gather, world_size
from .rounding import norms_of_errors

# Samples of a batch up to which it is tried how much each counts.
MOST_SAMPLES = 64
# Subjects that are named one by one; more are counted.
NAMED = 3
Explained = tuple[str, str] | None


def counts_causes(
    problem: Problem, failure: Failure, parts: Decomposition
) -> tuple[list[Cause], list[Counts]]:
    """The causes, and the counts that were found. A collective call.

    No cause if every micro-batch counts once, or if nothing explains the gradient.
    """
    counts: list[Counts] = []
    causes: list[Cause] = []
    for subjects in _levels(problem, failure, parts):
        reasons: dict[tuple[str, str], list[str]] = {}
        unexplained = []
        for subject, names in subjects.items():
            reason, counted = _explained(problem, failure, parts, names)
            if counted is not None and len(counts) < NAMED:
                counts.append(Counts(", ".join(filter(None, (failure.when, subject))), counted))
            if reason is None:
                unexplained.append(subject)
            elif reason[0]:
                reasons.setdefault(reason, []).append(subject)
        if not unexplained:
            reasons = _clipped_together(problem, parts, reasons)
            causes = [_cause(failure, *reason, names) for reason, names in reasons.items()]
            if len(causes) == 1 and list(reasons.values()) == [[""]]:
                causes = [_with_later_losses(problem, failure, parts, causes[0])]
            break
    if parts.unseen_and_doubled()[1]:
        causes = [replace(cause, explains=("micro-batches",)) for cause in causes]
    # The first rank's causes for all: ranks with other gradients would read them differently.
    return all_gather((causes, counts))[0]


def _clipped_together(
    problem: Problem, parts: Decomposition, reasons: dict[tuple[str, str], list[str]]
) -> dict[tuple[str, str], list[str]]:
    """`reasons` with that of parameters which are clipped by the norm of their own gradients together."""
    if problem.clip_norm is None:
        return reasons
    together: dict[tuple[str, str], list[str]] = {}
    for reason, names in reasons.items():
        several = len(names) > 1 and set(names) <= parts.gradient.keys()
        clipping = all_gather(clipping_in_words(problem, parts, names))[0] if several else None
        together.setdefault(clipping or reason, []).extend(names)
    return together


def _with_later_losses(problem: Problem, failure: Failure, parts: Decomposition, cause: Cause) -> Cause:
    """`cause` with the micro-batches that do not count in the last whole window, if they are other ones."""
    latest = failure.latest
    later = None if latest is None or failure.precision or parts.ranks > 1 else decompose(problem, latest)
    if latest is None or later is None:
        return cause
    lost = [each.lost(fit.counts) if (fit := each.fit(each.gradient)) else [] for each in (parts, later)]
    if not all(lost) or lost[0] == lost[1]:
        return cause
    other = ", ".join(map(str, lost[1][:6])) + (", ..." if len(lost[1]) > 6 else "")
    later = f"other ones in other updates: micro-batch {other} in update {latest.updates[0]}"
    return replace(cause, reason=f"{cause.reason}; {later}")


def _cause(failure: Failure, reason: str, advice: str, subjects: list[str]) -> Cause:
    if subjects != [""]:
        subject = _subject(subjects)
        changed = reason.replace(WHOLE_GRADIENT, subject, 1)
        reason = f"{subject}: {reason}" if changed == reason else changed
    shown = "the micro-batches' own gradients times those counts, and such terms, leave nothing of it"
    return failure.cause("wrong denominator", reason, shown, advice)


def _levels(problem: Problem, failure: Failure, parts: Decomposition) -> list[dict[str, list[str]]]:
    """The subjects that are explained one by one: all of it; parameter groups; parameters that differ."""
    levels = [{"": list(parts.gradient)}]
    groups = parameter_groups(problem, failure)
    if len(groups) > 1:
        levels.append({f"parameter group {k}": names for k, names in enumerate(groups) if names})
    gradient = failure.observation.gradient
    assert gradient is not None
    errors, bounds = norms_of_errors(gradient, failure.expected.gradient), failure.expected.bounds
    differing = {name for name in parts.gradient if not errors[name] <= bounds[name]}
    differing = set().union(*all_gather(differing))
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
    problem: Problem, failure: Failure, parts: Decomposition, names: list[str]
) -> tuple[Explained, list[list[float]] | None]:
    """(reason and advice, counts by rank) for the gradient of the parameters `names`.

    The reason is "" if the gradient is right; None instead of the pair if nothing explains it.
    """
    fit = parts.fit(names)
    every = all_gather(None if fit is None else fit.counts)
    complete = [counts for counts in every if counts is not None]
    whole = len(names) == len(parts.gradient)
    if len(complete) < len(every):
        if failure.precision:
            return None, None
        return all_gather(term_in_words(problem, parts, names))[0], None
    parts.every_rank = complete
    wrong = next((c for c in complete if not all(map(parts.is_one, c))), complete[0])
    unseen, doubled = parts.unseen_and_doubled() if whole else ([], [])
    if all(map(parts.is_one, wrong)) and not unseen and not doubled:
        if problem.transform_gradient is None:
            return ("", ""), parts.by_rank(wrong)
        return all_gather(clipping_in_words(problem, parts, names))[0] or ("", ""), parts.by_rank(wrong)
    simple = bool(unseen or doubled) or failure.precision or len({round(c, 5) for c in wrong}) == 1
    if not simple and (clipping := all_gather(clipping_in_words(problem, parts, names))[0]):
        return clipping, parts.by_rank(wrong)
    if not whole and problem.clip_norm is not None:
        if clipping := all_gather(clipping_in_words(problem, parts, names))[0]:
            return clipping, parts.by_rank(wrong)
    return counts_in_words(parts, wrong, WHOLE_GRADIENT, whole), parts.by_rank(wrong)


def lost_in_words(problem: Problem, failure: Failure, parts: Decomposition) -> str:
    """The micro-batches that do not count in the gradients of some parameters, in words; "" for none."""
    if parts.ranks > 1:
        return ""
    lost: dict[str, list[str]] = {}
    for name in _levels(problem, failure, parts)[-1]:
        fit = parts.fit([name])
        left_out = parts.lost(fit.counts) if fit is not None else []
        if fit is not None and 0 < len(left_out) < len(fit.counts):
            if all(k in left_out or parts.is_one(count) for k, count in enumerate(fit.counts)):
                which = ", ".join(map(str, left_out[:6])) + (", ..." if len(left_out) > 6 else "")
                lost.setdefault(f"micro-batch {which} of {len(fit.counts)} does not count", []).append(name)
    return "; ".join(f"in {_subject(names)} {which}" for which, names in lost.items())


def _subject(names: list[str]) -> str:
    if len(names) <= NAMED:
        return f"the gradient of {', '.join(names)}"
    return f"the gradient of {', '.join(names[:2])}, ... {names[-1]} ({len(names)} parameters)"


def samples_in_words(problem: Problem, failure: Failure) -> str:
    """How much single samples count, where that explains the gradient; "" otherwise."""
    samples = batch_size(failure.batch)
    if samples > MOST_SAMPLES or world_size() > 1:
        return ""
    single = Decomposition(problem, failure, [[[number] for number in range(samples)]])
    fit = single.fit(single.gradient)
    if fit is None or all(map(single.is_one, fit.counts)):
        return ""
    if proportional := _proportional(problem, single, fit.counts):
        return proportional
    counts = [0.0 if abs(count) <= single.count_tolerance else count for count in fit.counts]
    least, most = min(counts), max(counts)
    at = counts.index(least), counts.index(most)
    span = f"from {least:.3g} times (sample {at[0]}) to {most:.3g} times (sample {at[1]})"
    return f"its samples count unevenly, {span}"


def _proportional(problem: Problem, single: Decomposition, counts: list[float]) -> str:
    """What the `counts` of samples are proportional to, in words; "" if that is not known."""
    near = max(1e-5, single.count_tolerance)

    def alike(values: list[float]) -> bool:
        return all(values) and max(values) - min(values) <= near * max(map(abs, values))

    weighed = [count * weight for count, weight in zip(counts, single.weights, strict=True)]
    if alike(weighed) and not alike(single.weights):
        return "its samples count alike, whatever they weigh in the loss: a mean of the samples' own means"
    every = leaves(single.failure.batch[1])
    for leaf in every:
        if not has_samples(leaf, len(counts)):
            continue
        for text, number in likely_counts(leaf, "targets", len(every) == 1, ignore_index_of(problem.loss)):
            weights = [number(leaf[k : k + 1]) for k in range(len(counts))]
            if all(weights) and not alike(weights):
                if alike([count / weight for count, weight in zip(counts, weights, strict=True)]):
                    return f"its samples count by {text.format(number(leaf))}, not alike"
    return ""
