"""Why the first update that fails is not the larger batch's, by experiments on it.

The order is that of what a mistake would hide: optimizer steps, samples, counts of the micro-batches, other
terms, and what couples samples.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from .additivity import loss_average
from .certificate import Cause, Counts, first_names, number
from .count_causes import counts_causes, lost_in_words, samples_in_words
from .counts import Decomposition, decompose
from .coupling import NEGLIGIBLE, coupling_modules, loss_couples, whole_batch_outputs
from .evidence import Failure
from .float64 import DOUBLE
from .gradients import compare_window
from .hand_changes import changed_state_cause
from .loss_terms import name_of
from .micro_batches import even_micro_batches, is_partition
from .model_causes import backward_cause, modes_cause, without_gradient_cause
from .nested import batch_size
from .new_loops import new_loop_in_words
from .problem import Problem, copy_in
from .ranks import all_gather, world_size
from .rounding import larger_batch_of
from .term_causes import WHOLE_WINDOW_LOSS, not_a_mean_cause, not_a_sum_cause, term_causes

# Sources of causes that say what is wrong, but not where: other experiments are tried too.
UNEXPLAINED = ("unknown", "another loss", "underflow")
WITHOUT_STATISTICS = (
    "take a norm without statistics over samples (GroupNorm), or over groups that both share "
    "(ghost batch norm), or freeze the statistics; accumexp's window can take those of the whole window "
    "(accumexp.accum.window_batch_norm, model.norm=window)"
)
WHOLE_WINDOW_OUTPUT = (
    "return what it is computed from, a row for each sample, and compute it in the loss on all outputs of "
    "the window at once"
)


def diagnose(problem: Problem, failure: Failure, first_window: bool) -> tuple[list[Cause], list[Counts]]:
    """The causes of a gradient error, and how often each micro-batch counts in it. A collective call.

    Args:
        first_window: whether the failure is in a window from the first weights, which can be repeated.
    """
    if cause := steps_cause(failure) or _moved_cause(problem, failure) or _not_finite_cause(failure):
        return [cause], []
    causes: list[Cause] = []
    if first_window and (cause := _unrepeatable(problem, failure)):
        causes.append(cause)
    parts = decompose(problem, failure)
    explained, counts = term_causes(problem, failure, parts) if parts is not None else ([], [])
    if not explained and parts is not None:
        explained, counts = counts_causes(problem, failure, parts)
    if not explained and not failure.precision and (even := _evenly_cut(problem, failure, parts)) is not None:
        explained, counts = counts_causes(problem, failure, even)
    if parts is not None and (average := _average_cause(problem, failure, parts, counts)):
        explained = [average]
    causes += explained
    if not explained and (cause := _changed_buffers_cause(failure) or changed_state_cause(problem, failure)):
        return [*causes, cause], counts
    if not explained and (cause := modes_cause(problem, failure) or without_gradient_cause(failure)):
        return [*causes, cause], counts
    if not explained and not failure.precision:
        causes += _coupled(problem, failure) + _coupling_loss(problem, failure, parts)
        if not causes and parts is not None and (cause := not_a_mean_cause(problem, failure, parts)):
            causes.append(backward_cause(problem, failure, parts) or cause)
    return (causes or [_unexplained(problem, failure, parts)]), counts


def steps_cause(failure: Failure) -> Cause | None:
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
            reason = "the optimizer was not stepped in the window"
            return failure.cause("no update", reason, "", "step it once")
        if steps == 1:
            late = passes - early[0]
            left = "the last one does" if late == 1 else f"the last {late} do"
            after = f"after {early[0]} of {passes} micro-batches"
            reason = f"{of_rank} optimizer steps {after}: {left} not count in it"
        elif len(set(before)) == 1:
            reason = f"{of_rank} optimizer steps {steps} times at the end of the window"
        else:
            places = ", ".join(map(str, before[:6])) + (", ..." if len(before) > 6 else "")
            times = f"{of_rank} optimizer steps {steps} times in the window"
            reason = f"{times}: after micro-batch {places} of {passes}"
        advice = "step it once, after the window's last micro-batch"
        return failure.cause("optimizer steps", reason, "", advice)
    return None


def _not_finite_cause(failure: Failure) -> Cause | None:
    """The cause if the gradient has nan or infinities in fp64."""
    gradient = failure.observation.gradient or {}
    names = [name for name, g in gradient.items() if not bool(g.isfinite().all())]
    names = [name for each in all_gather(names) for name in each]
    if not names or failure.precision:
        return None
    window = f" in a window of {failure.window}" if failure.window and not failure.when else ""
    reason = f"the gradient of {names[0]} is not finite{window}"
    advice = "divide by 1 where a denominator is 0: a window may have no item of a kind"
    return failure.cause("not finite", reason, "", advice)


def _evenly_cut(problem: Problem, failure: Failure, parts: Decomposition | None) -> Decomposition | None:
    """The decomposition into even micro-batches, where the passes that were seen do not have all samples.

    Where their rows are not the batch's (packed samples, pairs one after the other) if as many are due.
    """
    samples, observation = batch_size(failure.batch), failure.observation
    even = even_micro_batches(problem, samples)
    if world_size() > 1 or observation.gradient is None:
        return None
    if parts is None and len(observation.sizes) != len(even[0]):
        return None
    if parts is not None and is_partition(parts.micro_batches, samples):
        return None
    return Decomposition(problem, failure, even)


def _moved_cause(problem: Problem, failure: Failure) -> Cause | None:
    """The cause if weights change before the window's last micro-batch."""
    observation = failure.observation
    if problem.perturb is not None or not any(all_gather(bool(observation.moved_before))):
        return None
    passes, factor, names = observation.moved_before, observation.moved_by, observation.moved
    which = "the weights" if len(names) == len(failure.expected.gradient) else first_names(names)
    change = f"multiplied by {factor:.6g}" if factor is not None else "changed"
    places = ", ".join(map(str, passes[:6]))
    reason = (
        f"within the window {which} {'are' if len(names) > 1 else 'is'} {change}, before micro-batch {places}"
    )
    return failure.cause("weights", reason, "", "change weights once, after the window's last micro-batch")


def _changed_buffers_cause(failure: Failure) -> Cause | None:
    """The cause if the loop changes buffers before the window's last micro-batch."""
    changed = all_gather(failure.observation.changed_buffers)[0]
    if not changed:
        return None
    names = first_names(sorted({name for each in changed.values() for name in each}))
    places = ", ".join(map(str, changed))
    reason = f"the loop changes buffer {names} within the window, before micro-batch {places}"
    return failure.cause("buffers", reason, "", "change it once, after the window's last micro-batch")


def _average_cause(
    problem: Problem, failure: Failure, parts: Decomposition, counts: list[Counts]
) -> Cause | None:
    """The cause if the loop averages micro-batches whose loss is a mean over something else than samples."""
    flat = [count for each in counts[0].counts for count in each] if counts else []
    shares = [count * weight for count, weight in zip(flat, parts.weights, strict=False)]
    alike = bool(shares) and max(shares) - min(shares) <= parts.count_tolerance * max(map(abs, shares))
    if parts.shares is not None or not (alike or (flat and all(map(parts.is_one, flat)))):
        return None
    outputs = larger_batch_of(problem, copy_in(problem.model, DOUBLE), failure.batch).outputs
    inputs, targets = failure.batch
    average = loss_average(problem.loss, outputs, targets, copy_in(problem.model, DOUBLE), inputs)
    if average is None or (average.kind == "coupled" and not average.description):
        return None
    shown = "the loss of parts of the batch was compared with that of all of it"
    advice = average.advice
    if average.kind == "items":
        advice = f"divide by the {average.description} in the whole window; for accumexp's window {advice}"
    return failure.cause("loss average", average.reason, shown, advice)


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
        reason += f", {failure.when}" if failure.when else ""
        shown = f"its output on half the batch is off by {max(c.effect for c in same_kind):.2g}; {effect}"
        causes.append(Cause("batch statistics", where, reason, error, shown, WITHOUT_STATISTICS))
    return causes


def _coupling_loss(problem: Problem, failure: Failure, parts: Decomposition | None) -> list[Cause]:
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
    if problem.couples or problem.terms:  # what couples samples in these has been tried
        cause = not_a_sum_cause(problem, failure, parts) if parts and not problem.couples else None
        return [cause] if cause else []
    effect, what = loss_couples(problem, batch), "samples"
    if not effect > NEGLIGIBLE:
        effect, what = loss_couples(problem, batch, by_targets=True), "samples' targets"
    if not effect > NEGLIGIBLE:
        return []
    name = name_of(problem.loss)
    reason = f"couples samples: a sample's term depends on the other {what} of its micro-batch"
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


def underflow_in_words(failure: Failure) -> str:
    """How many elements of the gradient are zero that should not be, in words; "" for few."""
    gradient = failure.observation.gradient or {}
    expected = failure.expected.gradient
    lost = [(gradient[name] == 0) & (g != 0) for name, g in expected.items() if name in gradient]
    zero = sum(int(each.sum()) for each in lost)
    due = sum(int((g != 0).sum()) for g in expected.values())
    if zero < 0.1 * due:
        return ""
    return f"; {zero} of its {due} elements are zero by underflow: losses are too small for this precision"


def _unexplained(problem: Problem, failure: Failure, parts: Decomposition | None) -> Cause:
    """Says where, when and how much, where no experiment says why."""
    worst, source, advice = (
        failure.comparison,
        "unknown",
        "compare the loop with the larger batch on this window",
    )
    reason = f"the gradient is off by {number(worst.error)} of its norm, most at {worst.name}"
    if parts is None:
        reason += ", and the loop passes rows to the model that are not in the batch"
    elif failure.precision:
        if underflow := underflow_in_words(failure):
            source, advice = "underflow", "scale losses up, and divide the complete gradient"
            reason += underflow
    else:
        samples = samples_in_words(problem, failure)
        lost = lost_in_words(problem, failure, parts)
        texts = [lost, samples, new_loop_in_words(problem, failure, parts)]
        reason += "".join(f"; {text}" for text in texts if text)
        if samples:
            source, advice = (
                "another loss",
                "weigh samples as the loss does that certify is given, or give it the loop's",
            )
    shown = f"{number(worst.figure)} at {worst.name}, where rounding makes at most {number(worst.bound)}"
    return failure.cause(source, reason, shown, advice)
