"""Causes of failed checks of buffers, logged losses, precision and resuming."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .buffer_updates import updates_of_buffer
from .certificate import Cause, Check
from .evidence import updates_in_words
from .float64 import DOUBLE
from .larger_batch import Gradient
from .micro_batches import rank_micro_batches
from .nested import batch_size
from .observation import Observation
from .problem import Problem, WholeBatch, copy_in, rows
from .rounding import larger_batch_of

# The source of a buffer that only the first micro-batch moves.
FIRST_ALONE = "first micro-batch's buffer"
# What an addition in the lowest precision in use (bf16) may be off by, of the sum.
LOWEST = torch.finfo(torch.bfloat16).eps


@dataclass(frozen=True)
class LoggedLoss:
    """The first update whose logged loss is not the larger batch's, and what it was made of.

    Attributes:
        updates: numbers of all such updates.
        compared: numbers of all updates that log a loss.
    """

    update: int
    logged: float
    expected: float
    batch: WholeBatch
    observation: Observation
    weights: Gradient
    updates: list[int]
    compared: list[int]


def logged_loss_cause(problem: Problem, logged: LoggedLoss) -> Cause:
    """What the loop logs instead of the larger batch's loss."""
    advice = "log the window's loss: the sum of the micro-batches' sums over the window's weight"
    reason = (
        f"the logged loss is {logged.logged:.6g} where the larger batch's is {logged.expected:.6g}, in "
        f"update {logged.update}"
    )
    if logged.weights:
        model = copy_in(problem.model, DOUBLE)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(logged.weights[name])
        if what := _what_is_logged(problem, model, logged):
            reason += f": {what}"
    if len(logged.updates) > 1 and (when := updates_in_words(logged.updates, logged.compared)):
        reason += f"; it is wrong {when}"
    return Cause("logged loss", "", reason, math.nan, "", advice)


def _what_is_logged(problem: Problem, model: torch.nn.Module, logged: LoggedLoss) -> str:
    micro_batches = rank_micro_batches(logged.batch, logged.observation)
    if micro_batches is None:
        return ""
    device = problem.device
    terms = larger_batch_of(problem, model, logged.batch).terms
    means = [
        float(larger_batch_of(problem, model, rows(logged.batch, torch.tensor(numbers, device=device))).loss)
        for each in micro_batches
        for numbers in each
        if numbers
    ]
    count = len(means)
    candidates = [
        (means[-1], "the last micro-batch's"),
        (means[0], "the first micro-batch's"),
        (sum(means), f"the sum of {count} micro-batches' means"),
        (sum(means) / count, f"the mean of {count} micro-batches' means, whatever they weigh"),
        (means[-1] / count, f"the last micro-batch's, divided by {count}"),
        (logged.expected / problem.steps, f"divided by {problem.steps} once more"),
        (logged.expected * batch_size(logged.batch), "the sum over samples, not their mean"),
        (logged.expected * problem.steps, f"{problem.steps} times it"),
        *((float(value), f"term {name!r} alone") for name, value in terms.items()),
        *((logged.expected - float(value), f"without term {name!r}") for name, value in terms.items()),
    ]
    near = 1e-5 * max(abs(logged.logged), 1e-12)
    return next((what for value, what in candidates if abs(value - logged.logged) <= near), "")


def buffers_cause(problem: Problem, failed: Sequence[Check], micro_batches: int) -> Cause:
    """The cause of the `failed` buffers checks: each of `micro_batches` updates the buffers."""
    first = next((check for check in failed if check.name == "buffers"), None)
    check = failed[-1]  # that of the updates says in which of them
    name, *when = check.detail.removeprefix("worst at ").split(", ")
    when = ", ".join(when[1:] if when and when[0].startswith("update") else when)
    module_name, _, buffer = name.rpartition(".")
    module = problem.model.get_submodule(module_name)
    momentum = getattr(module, "momentum", None)
    where = f"{module_name or '(model)'} ({type(module).__name__})"
    source = "buffers"
    if buffer == "num_batches_tracked" and momentum == 0:
        advice = "count updates elsewhere"
        reason = f"buffer {buffer} counts {micro_batches} forward passes an update"
    elif isinstance(momentum, float) and hasattr(module, "running_mean"):
        advice = "use buffers that do not follow the batch"
        if micro_batches > 1:
            matching = 1 - (1 - momentum) ** (1 / micro_batches)
            advice = f"momentum {matching:.4g} instead of {momentum:g} forgets at the same pace"
        updates = len(updates_of_buffer(problem, module_name, buffer).passes)
        reason = f"running statistics updated {updates or micro_batches} times an update"
        if updates > micro_batches:
            reason += f", by several passes of {micro_batches} micro-batches"
            advice = f"restore buffers after a pass without gradients; {advice}"
    else:
        advice = "change it once a window, with the whole window's figures"
        reason = f"buffer {buffer} is not what one pass over the whole batch makes of it"
        updates = updates_of_buffer(problem, module_name, buffer) if first is not None else None
        if updates is not None and updates.first_alone:
            source = FIRST_ALONE
            advice = "take it from the whole batch, before the first micro-batch"
            of = f"of {updates.first_size} of {problem.samples} samples"
            reason = f"buffer {buffer} is the first micro-batch's, {of}, which the others meet too"
        if updates is not None and (how := updates.in_words()):
            reason += f": {how}"
    if when:
        reason += f", {when}"
    shown = f"after one window {buffer} is off by {(first or check).figure:.2g}"
    return Cause(source, where, reason, math.nan, shown, advice)


def low_precision_causes(problem: Problem, failed: Sequence[Check]) -> list[Cause]:
    """The cause of a failed addition check, if the same gradients are added correctly in fp64.

    None for an error that no rounding makes: the optimizer then receives something else than the sum.
    """
    # The last one is that of the updates, which says in which of them.
    addition = next((check for check in reversed(failed) if check.name.startswith("addition")), None)
    if addition is None or any(check.name == "gradient, fp64" for check in failed):
        return []
    name = str(problem.dtype).removeprefix("torch.")
    if addition.figure > problem.steps * max(torch.finfo(problem.dtype).eps, LOWEST):
        return []
    low = torch.finfo(problem.dtype).eps > torch.finfo(torch.float32).eps
    kept = f"added in {name}" if low else f"kept in less than {name}"
    error = f"off by {addition.figure:.2g} where rounding the sum once gives {addition.bound:.2g}"
    at = addition.detail.removeprefix("worst at ")
    reason = f"sums of {problem.steps} gradients are {kept}, most at {at}: {error}"
    shown = "in fp64 the same window is the larger batch"
    advice = "add in fp32 and round once (accumexp's window: accum.fp32_buffers=true)"
    return [Cause("low-precision accumulation", "", reason, addition.figure, shown, advice)]


def simple_cause(check: Check) -> Cause | None:
    """The cause that a failed check states by itself, or None."""
    name = check.name
    if name.startswith("resume"):
        reason = (
            "a window after a stop differs: the loop keeps something that model, optimizer and schedule do "
            f"not save ({check.detail})"
        )
        return Cause("resume", "", reason, math.nan, "", "keep it in what is saved, or name it with state=")
    if name == "state":
        reason = f"what the loop changes by hand is not what one micro-batch makes of it: {check.detail}"
        return Cause("state", "", reason, math.nan, "", "change it once a window, after the optimizer's step")
    if name == "ranks agree":
        reason = "the ranks step with different gradients"
        return Cause("ranks", "", reason, math.nan, "", "reduce the window's whole gradient before the step")
    return None
