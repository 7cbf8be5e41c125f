"""What is in a wrong gradient beside its micro-batches: carried over, decay, clipped or left-out parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from .counts import Decomposition
from .larger_batch import Gradient, clamped, clipped, dot, norm
from .nested import batch_size
from .new_loops import gradient_of_new_loop
from .problem import Problem, rows
from .rounding import larger_batch_of, part_gradient, perturbed_model, transformed

OWN_WINDOW = "give the optimizer the gradient of the window that it ends"
ZERO = "set the gradients of all parameters to zero before each window"
MOVE_ONCE = "move the weights once, along the whole window's gradient, then compute the window again"
ONCE = "add it once a window, or divide it by the number of micro-batches as the loss is"
WHOLE_OF_IT = "add the whole of it, once a window"
WINDOW = "clip the whole window's gradient once, before the step"
NOT_ASKED = "leave it out; if it is meant, do it once for the whole window, and give certify {option}="
SAY_SO = "if it is meant, give certify transform_gradient=, or a loss that has it"
# Largest share of what is to be explained that an explanation leaves.
LEFT = 0.01


def term_in_words(problem: Problem, parts: Decomposition, names: list[str]) -> tuple[str, str] | None:
    """(what else is in the gradient of the parameters `names`, what to do); None if nothing explains it."""
    rest = {name: value for name, value in parts.rest().items() if name in names}
    # Of some parameters the text begins with their gradient.
    gradient = "the gradient" if len(names) == len(parts.gradient) else "it"
    size = norm({name: parts.gradient[name] for name in names}) or 1.0
    if norm(rest) <= parts.tolerance * size:
        return None
    return (
        _of_the_window_before(parts, names, size)
        or _carried_over(parts, rest, size)
        or _decay(problem, parts, rest, size, gradient)
        or _unmoved(problem, parts, rest, size, gradient)
        or _moved_by_each(problem, parts, names, size)
        or _labels_of_others(problem, parts, names, size)
        or clipping_in_words(problem, parts, names)
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
    return factor if explained and left <= LEFT * norm(rest) else None


def _of_the_window_before(parts: Decomposition, names: list[str], size: float) -> tuple[str, str] | None:
    """Whether the gradient is the one of the window before, and this window's own is not in it."""
    gradient = {name: parts.gradient[name] for name in names}
    factor = _factor(gradient, parts.failure.previous or {}, size, parts.tolerance)
    if factor is None:
        return None
    times = "" if abs(factor - 1) < 0.01 else f", {factor:.3g}-fold"
    return f"the gradient is that of the window before{times}: this window's does not count", OWN_WINDOW


def _carried_over(parts: Decomposition, rest: Gradient, size: float) -> tuple[str, str] | None:
    failure = parts.failure
    held = failure.observation.initial
    if (factor := _factor(rest, failure.previous or {}, size, parts.tolerance)) is not None:
        times = "" if abs(factor - 1) < 0.01 else f", {factor:.3g}-fold"
        return f"the gradient of the window before is still in it{times}", ZERO
    initial = {name: held.get(name, torch.zeros_like(g)) for name, g in rest.items()}
    factor = _factor(rest, initial, size, parts.tolerance)
    if factor is None or abs(factor) <= parts.count_tolerance:
        return None
    times = "" if abs(factor - 1) < 0.01 else f", {factor:.3g}-fold"
    of = f" of {', '.join(list(held)[:3])}" if len(held) < len(parts.gradient) else ""
    return (
        f"the gradient of the window before is still in it: what .grad{of} held when the window began{times}",
        ZERO,
    )


def _decay(
    problem: Problem, parts: Decomposition, rest: Gradient, size: float, gradient: str
) -> tuple[str, str] | None:
    weights = {name: p.detach() for name, p in parts.failure.model.named_parameters() if name in rest}
    number = sum(len(each) for each in parts.micro_batches)
    for term, what in (
        (weights, "the parameters (an L2 penalty)"),
        ({name: w.sign() for name, w in weights.items()}, "the parameters' signs (an L1 penalty)"),
    ):
        factor = _factor(rest, term, size, parts.tolerance)
        if factor is None:
            continue
        right = _factor(_transformation(problem, parts, rest), term, size, parts.tolerance) or 0.0
        total = factor + right
        if right and abs(total - number * right) <= 1e-3 * abs(total):
            asked = f", {right:.4g} is asked for: {right:.4g} in each of {number} micro-batches"
            return f"{total:.4g} times {what} is added to {gradient}{asked}", ONCE
        if right and abs(total) > 1e-3 * abs(right):
            reason = f"{total:.4g} times {what} is in {gradient}, {right:.4g} is asked for"
            divided = abs(total * number - right) <= 1e-3 * abs(right)
            return f"{reason}: divided by {number}" if divided else reason, WHOLE_OF_IT
        if factor < 0:
            return f"{-factor:.4g} times {what} is missing in {gradient}", WHOLE_OF_IT
        single = gradient_of_new_loop(problem, parts, steps=1)
        once = None if single is None else {name: single[name] - _sum(parts, name) for name in rest}
        per_window = _factor(once, term, size, parts.tolerance) if once is not None else None
        if per_window is not None and abs(factor - number * per_window) <= 1e-3 * abs(factor):
            each = f"{per_window:.4g} in each of {number} micro-batches"
            reason = f"{factor:.4g} times {what} is added to {gradient}: {each}"
            return reason, NOT_ASKED.format(option="transform_gradient")
        return f"{factor:.4g} times {what} is added to {gradient}, which the loss does not have", SAY_SO
    return None


def _transformation(problem: Problem, parts: Decomposition, rest: Gradient) -> Gradient:
    """What `Problem.transform_gradient` should add."""
    exact = parts.failure.expected.larger.gradient
    made = transformed(problem, parts.failure.model, exact)
    return {name: made[name].double() - exact[name].double() for name in rest}


def _sum(parts: Decomposition, name: str) -> torch.Tensor:
    return torch.stack([part[name].double() for part in parts.parts]).sum(0)


def _unmoved(
    problem: Problem, parts: Decomposition, rest: Gradient, size: float, gradient: str
) -> tuple[str, str] | None:
    if problem.perturb is None:
        return None
    unmoved = larger_batch_of(problem, parts.failure.model, parts.failure.batch).gradient
    factor = _factor(rest, unmoved, size, parts.tolerance)
    if factor is None:
        return None
    times = "" if abs(factor - 1) < 0.01 else f", {factor:.3g}-fold"
    return f"the gradient at the unmoved weights is added to {gradient}{times}", ZERO


def _moved_by_each(
    problem: Problem, parts: Decomposition, names: list[str], size: float
) -> tuple[str, str] | None:
    """Whether each micro-batch moves the weights along its own gradient, not along the window's."""
    if problem.perturb is None or parts.ranks > 1 or parts.shares is not None:
        return None
    batch = parts.failure.batch
    total = {name: torch.zeros_like(g) for name, g in parts.gradient.items()}
    for numbers in parts.micro_batches[0]:
        part = rows(batch, torch.tensor(numbers, device=problem.device))
        model = perturbed_model(problem, parts.failure.model, part)
        gradient, _ = part_gradient(problem, model, batch, numbers)
        total = {name: value + gradient[name] for name, value in total.items()}
    if norm({name: total[name] - parts.gradient[name] for name in names}) > parts.tolerance * size:
        return None
    return "each micro-batch moves the weights along its own gradient, not along the window's", MOVE_ONCE


def _labels_of_others(
    problem: Problem, parts: Decomposition, names: list[str], size: float
) -> tuple[str, str] | None:
    """Whether the inputs of a micro-batch meet the targets that come next in the batch."""
    order = [number for numbers in parts.micro_batches[0] for number in numbers]
    samples = batch_size(parts.failure.batch)
    if parts.ranks > 1 or sorted(order) != list(range(samples)) or order == list(range(samples)):
        return None
    inputs, targets = parts.failure.batch
    device = problem.device
    targets_in_order = rows((targets, None), torch.tensor(order, device=device).argsort())[0]
    gradient = larger_batch_of(problem, parts.failure.model, (inputs, targets_in_order)).gradient
    if (
        norm({name: gradient[name].double() - parts.gradient[name] for name in names})
        > parts.tolerance * size
    ):
        return None
    first = ", ".join(map(str, order[:4]))
    reason = (
        f"inputs meet the targets of other samples: those of samples {first}, ... meet "
        "the targets of samples 0, 1, 2, 3, ..."
    )
    return reason, "cut inputs and targets in the same way"


def clipping_in_words(problem: Problem, parts: Decomposition, names: list[str]) -> tuple[str, str] | None:
    """(how the gradient of the parameters `names` is clipped or changed, what to do); None if it is not."""
    target = parts.failure.observation.gradient
    if parts.ranks > 1 or target is None:
        return None
    target = {name: target[name].double() for name in names}
    size = norm(target)
    for how, made, advice in _clippings(problem, parts, target):
        if norm({name: made[name] - target[name] for name in names}) <= parts.tolerance * (size or 1.0):
            return how, advice
    return None


def _clippings(
    problem: Problem, parts: Decomposition, target: Gradient
) -> Iterator[tuple[str, Gradient, str]]:
    """Texts and gradients of loops that clip or change the gradient otherwise, and what to do."""
    sums = {name: _sum(parts, name) for name in parts.gradient}
    whole = len(target) == len(parts.gradient)
    if problem.transform_gradient is not None and whole:
        left_out = clamped(clipped(sums, problem.clip_norm), problem.clip_value)
        yield "the change that transform_gradient makes is left out", left_out, "make it once a window"
        model = parts.failure.model
        yield from _inside(
            "changed by transform_gradient",
            parts,
            lambda g: transformed(problem, model, g),
            "make it once a window",
        )
    if problem.clip_norm is not None and whole:
        limit = problem.clip_norm
        each = {name: clipped({name: g}, limit)[name] for name, g in sums.items()}
        yield "each parameter is clipped by its own norm, not by that of all parameters", each, WINDOW
    if problem.clip_norm is not None:
        limit = problem.clip_norm
        yield "the gradient is not clipped", sums, WINDOW
        some = clipped({name: sums[name] for name in target}, limit)
        yield "the gradient is clipped by its own norm, not by that of all parameters", some, WINDOW
    norms = dict.fromkeys([problem.clip_norm, norm(target) if whole else None])
    values = dict.fromkeys([problem.clip_value, *_repeated_largest(target, len(parts.parts))])
    for limit in filter(None, norms):
        how = f"clipped by norm (to {limit:.4g})"
        asked = "" if problem.clip_norm is not None else "clip_norm"
        yield from _inside(how, parts, lambda g, limit=limit: clipped(g, limit), WINDOW, asked)
    values |= dict.fromkeys(_clamping(parts, target))
    for limit in filter(None, values):
        how = f"clipped by value (to {limit:.4g})"
        asked = "" if problem.clip_value is not None else "clip_value"
        yield from _inside(how, parts, lambda g, limit=limit: clamped(g, limit), WINDOW, asked)


def _repeated_largest(target: Gradient, number: int) -> list[float]:
    """Values to which elements may be clamped: the largest one, if several elements have it."""
    flat = torch.cat([g.flatten().abs() for g in target.values()])
    largest = flat.max()
    several = int((flat >= largest * (1 - 1e-9)).sum()) > 1
    return [float(largest), float(largest) / number] if several else []


def _clamping(parts: Decomposition, target: Gradient) -> list[float]:
    """The value to which each part's elements are clamped, if clamped parts add up to `target`."""
    columns = [torch.cat([part[name].double().flatten() for name in target]) for part in parts.parts]
    goal = torch.cat([g.flatten() for g in target.values()])
    low, high = 0.0, float(torch.stack(columns).abs().max())
    for _ in range(60):
        middle = (low + high) / 2
        clamped_sum = torch.stack([column.clamp(-middle, middle) for column in columns]).sum(0)
        if float(clamped_sum @ goal) < float(goal @ goal):
            low = middle
        else:
            high = middle
    return [high]


def _inside(
    how: str, parts: Decomposition, change: Callable[[Gradient], Gradient], advice: str, missing: str = ""
) -> Iterator[tuple[str, Gradient, str]]:
    """Gradients of loops that `change` each micro-batch's part, or the sum so far.

    Args:
        missing: the option of certify that would ask for it, if it is not given.
    """
    number = len(parts.parts)
    text = f"the gradient is {how} in every micro-batch, not once for the window"
    if missing:
        text = f"the gradient is {how} in every micro-batch, where nothing is to be clipped (no {missing}=)"
        advice = NOT_ASKED.format(option=missing)
    for multiple in (1.0, float(number)):
        running: Gradient = {}
        separate: Gradient = {}
        acted = [False, False]
        for position, part in enumerate(parts.parts):
            part = {name: g.double() * multiple for name, g in part.items()}
            added = {n: g + running[n] if running else g for n, g in part.items()}
            running, once = change(added), change(part)
            if position < number - 1:
                acted[0] |= _differs(running, added)
            acted[1] |= _differs(once, part)
            separate = {n: g + separate[n] if separate else g for n, g in once.items()}
        for made, acts in zip((running, separate), acted, strict=True):
            if acts and number > 1:
                yield text, change(made), advice
                yield text, made, advice
                yield text, {name: g / multiple for name, g in made.items()}, advice


def _differs(one: Gradient, other: Gradient) -> bool:
    return norm({name: one[name] - g for name, g in other.items()}) > 1e-3 * norm(other)
