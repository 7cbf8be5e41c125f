"""Terms in a wrong gradient that no micro-batch explains: carried over, decay, added or clipped parts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from .counts import Decomposition
from .float64 import DOUBLE
from .larger_batch import Gradient, clamped, clipped, dot, norm
from .observation import observe
from .problem import Problem, TrainingState, WholeBatch, cast, rows
from .rounding import larger_batch_of

ZERO = "set the gradients of all parameters to zero before each window"
ONCE = "add it once a window, or divide it by the number of micro-batches as the loss is"
WHOLE_GRADIENT = "clip the whole window's gradient once, before the step"
SAY_SO = "if it is meant, give certify transform_gradient=, or a loss that has it"


def term_cause(problem: Problem, parts: Decomposition, names: list[str]) -> tuple[str, str] | None:
    """(what else is in the gradient of the parameters `names`, what to do); None if nothing explains it."""
    rest = {name: value for name, value in parts.rest().items() if name in names}
    size = norm({name: parts.gradient[name] for name in names}) or 1.0
    if norm(rest) <= parts.tolerance * size:
        return None
    return (
        _carried_over(parts, rest, size)
        or _decay(problem, parts, rest, size)
        or clipped_inside(problem, parts, names)
        or _added_once_a_micro_batch(problem, parts, rest, size)
    )


def _factor(rest: Gradient, term: Gradient, size: float, tolerance: float) -> float | None:
    """The factor by which `term` explains `rest`, up to `tolerance` of `size`; None if it does not."""
    term = {name: term[name].double() for name in rest if name in term}
    square = dot(term, term)
    if len(term) < len(rest) or not square:
        return None
    factor = dot(term, rest) / square
    left = norm({name: value - factor * term[name] for name, value in rest.items()})
    explained = left <= tolerance * max(size, abs(factor) * math.sqrt(square))
    return factor if explained and left <= 0.1 * norm(rest) else None


def _carried_over(parts: Decomposition, rest: Gradient, size: float) -> tuple[str, str] | None:
    failure = parts.failure
    initial = {name: failure.observation.initial.get(name, torch.zeros_like(g)) for name, g in rest.items()}
    for term, what in (
        (initial, "what .grad held when the window began"),
        (failure.previous or {}, "the gradient of the window before"),
    ):
        factor = _factor(rest, term, size, parts.tolerance)
        if factor is not None and abs(factor) > parts.count_tolerance:
            times = "" if abs(factor - 1) < 0.01 else f", {factor:.3g}-fold"
            if "window before" in what:
                return f"{what} is still in it{times}", ZERO
            return f"the gradient of the window before is still in it: {what}{times}", ZERO
    return None


def _decay(problem: Problem, parts: Decomposition, rest: Gradient, size: float) -> tuple[str, str] | None:
    weights = {name: p.detach() for name, p in parts.failure.model.named_parameters() if name in rest}
    number = sum(len(each) for each in parts.micro_batches)
    for term, what in (
        (weights, "the parameters (an L2 penalty)"),
        ({name: w.sign() for name, w in weights.items()}, "the parameters' signs (an L1 penalty)"),
    ):
        factor = _factor(rest, term, size, parts.tolerance)
        if factor is None:
            continue
        once = _once(problem, parts, rest)
        per_window = _factor(once, term, size, parts.tolerance) if once is not None else None
        if per_window is not None and abs(factor - number * per_window) <= 1e-3 * abs(factor):
            each = f"{per_window:.4g} in each of {number} micro-batches"
            reason = f"{factor:.4g} times {what} is added to it: {each}"
            return reason, ONCE
        return f"{factor:.4g} times {what} is added to it, which the loss does not have", SAY_SO
    return None


def _once(problem: Problem, parts: Decomposition, rest: Gradient) -> Gradient | None:
    """What the loop adds to the gradient when it makes a single micro-batch of the whole batch."""
    own = _gradient_in_one(problem, parts, parts.failure.batch)
    if own is None:
        return None
    total = {name: sum(part[name] for part in parts.parts) for name in rest}
    return {name: own[name].double() - total[name] for name in rest}


def _gradient_in_one(problem: Problem, parts: Decomposition, batch: WholeBatch) -> Gradient | None:
    """The gradient of the loop on `batch` as a single micro-batch, from the failing update's weights."""
    if parts.ranks > 1:
        return None
    single = replace(problem, model=copy.deepcopy(parts.failure.model), steps=1, clip_norm=None)
    try:
        return observe(TrainingState(single, DOUBLE), cast(batch, DOUBLE)).gradient
    except Exception:
        return None


def _added_once_a_micro_batch(
    problem: Problem, parts: Decomposition, rest: Gradient, size: float
) -> tuple[str, str] | None:
    number = sum(len(each) for each in parts.micro_batches)
    once = _once(problem, parts, rest)
    if once is None or norm(once) <= 1e-9 * size:
        return None
    factor = _factor(rest, once, size, parts.tolerance)
    if factor is not None:
        if abs(factor - number) <= 1e-3 * number and number > 1:
            return f"a term that the loss does not have is added in each of {number} micro-batches", ONCE
        return (
            f"a term that the loss does not have is added to it, {norm(rest) / size:.2g} of its size",
            SAY_SO,
        )
    total: Gradient = {}
    for numbers in parts.micro_batches[0]:
        batch = rows(parts.failure.batch, torch.tensor(numbers, device=problem.device))
        own = _gradient_in_one(problem, parts, batch)
        if own is None:
            return None
        model = parts.failure.model
        alone = larger_batch_of(problem, model, batch).gradient
        term = {name: own[name].double() - alone[name] for name in rest}
        total = {name: value + total[name] if total else value for name, value in term.items()}
    if (factor := _factor(rest, total, size, parts.tolerance)) is None:
        return None
    if abs(factor - 1) <= 1e-3:
        reason = (
            f"a term of each micro-batch's own, beside the loss, is added in full in each of {number} "
            "micro-batches"
        )
        return reason, ONCE
    return (
        f"a term of each micro-batch's own, which the loss does not have, is added {factor:.3g}-fold",
        SAY_SO,
    )


def clipped_inside(problem: Problem, parts: Decomposition, names: list[str]) -> tuple[str, str] | None:
    """(how the gradient is clipped in every micro-batch, what to do); None if it is not."""
    if parts.ranks > 1 or len(parts.parts) < 2:
        return None
    target = parts.failure.observation.gradient
    assert target is not None
    target = {name: g.double() for name, g in target.items()}
    for how, made in _clippings(problem, parts, target):
        left = norm({name: made[name] - target[name] for name in names})
        if left <= parts.tolerance * (norm({name: target[name] for name in names}) or 1.0):
            return (
                f"the gradient is clipped {how} in every micro-batch, not once for the window",
                WHOLE_GRADIENT,
            )
    return None


def _clippings(problem: Problem, parts: Decomposition, target: Gradient) -> Iterator[tuple[str, Gradient]]:
    """Gradients of loops that clip in every micro-batch, and how."""
    norms = [problem.clip_norm, norm(target)]
    values = [problem.clip_value, max(float(g.abs().max()) for g in target.values() if g.numel())]
    limits = [("by norm", limit, clipped) for limit in dict.fromkeys(norms) if limit]
    limits += [("by value", limit, clamped) for limit in dict.fromkeys(values) if limit]
    number = len(parts.parts)
    for how, limit, clip in limits:
        for multiple in (1.0, float(number)):  # the loss may be divided after clipping
            running: Gradient = {}
            separate: Gradient = {}
            acted = [False, False]
            for number_of_part, part in enumerate(parts.parts):
                part = {name: g.double() * multiple for name, g in part.items()}
                added = {n: g + running[n] if running else g for n, g in part.items()}
                running, once = clip(added, limit), clip(part, limit)
                if number_of_part < number - 1:
                    acted[0] |= norm(running) < 0.999 * norm(added)
                acted[1] |= norm(once) < 0.999 * norm(part)
                separate = {n: g + separate[n] if separate else g for n, g in once.items()}
            for made, clips in zip((running, separate), acted, strict=True):
                if clips:
                    yield f"{how} (to {limit:.4g})", clip(made, limit)
                    yield f"{how} (to {limit:.4g})", made
                    yield f"{how} (to {limit:.4g})", {name: g / multiple for name, g in made.items()}
