"""The window's gradient against the larger batch's: in fp64, in the run's precision, and its addition."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .certificate import Check
from .larger_batch import Gradient, clipped, norm
from .observation import Observation, observe
from .problem import Batch, Problem, Start, cast
from .ranks import all_gather, ranks, worst
from .rounding import (
    LARGER,
    ROUNDING,
    U32,
    WINDOWS,
    Expected,
    clipping,
    expected,
    in_precision,
    narrowed,
    part_in_precision,
    rough_in_precision,
    roundoff,
    shuffled,
)

DOUBLE = torch.float64
# Windows that a loop may skip before one counts: a loss scale of 2^16 is below 1 after that many halvings.
TRIES = 24
WHOLE = "all of it"
NEAREST = (
    f"the larger batch's own distance from its fp64 gradient: the window's nearest of {WINDOWS} against the "
    f"larger batch's farthest of {LARGER}, and what its micro-batches lose by themselves"
)
ONCE = (
    "adding in fp32 what autograd delivers, and rounding the sum once: (N-1) u of the terms' norms, and the "
    "rounding itself"
)


@dataclass(frozen=True)
class Compared:
    """A gradient held against the expected one.

    Attributes:
        error: of the whole gradient, relative to the larger batch's, over all ranks.
        ratio: the worst parameter's error over its bound; at most 1 where the gradients are equal.
        name: that parameter.
        figure, limit: its error and bound, relative to the whole gradient's norm.
    """

    error: float
    ratio: float
    name: str
    figure: float
    limit: float

    @property
    def equal(self) -> bool:
        return self.ratio <= 1


def compare(found: Gradient | None, right: Expected) -> Compared:
    """`found` against `right`, by parameter, as the worst rank sees it."""
    own = _compare(found, right)
    every = all_gather(own)
    return next((c for c in every if math.isnan(c.ratio)), None) or max(every, key=lambda c: c.ratio)


def _compare(found: Gradient | None, right: Expected) -> Compared:
    if found is None:
        return Compared(math.inf, math.inf, "no update was made", math.inf, 0.0)
    if found.keys() != right.gradient.keys():
        return Compared(math.inf, math.inf, "other parameters", math.inf, 0.0)
    size = norm(right.gradient) or 1.0
    errors = {name: float((found[name].double() - g).norm()) for name, g in right.gradient.items()}
    ratios = {name: _over(error, right.bound[name]) for name, error in errors.items()}
    nan = [name for name, ratio in ratios.items() if math.isnan(ratio)]
    name = nan[0] if nan else max(ratios, key=lambda key: ratios[key])
    error = math.sqrt(sum(value * value for value in errors.values())) / size
    return Compared(error, ratios[name], name, errors[name] / size, right.bound[name] / size)


def _over(error: float, bound: float) -> float:
    if bound:
        return error / bound
    return 0.0 if error == 0 else math.nan if math.isnan(error) else math.inf


def gradient_check(
    name: str,
    problem: Problem,
    batch: Batch,
    detail: str = "",
    start: Start | None = None,
) -> tuple[Check, Observation, Expected]:
    """Every parameter's gradient on `batch` in fp64, in the first window of `start` or of a fresh one."""
    start = start or Start(problem, DOUBLE)
    batch = cast(batch, DOUBLE)
    right = expected(problem, batch, narrowed(problem.model, DOUBLE), problem.clip_norm)
    seen = observe(start, batch)
    return check_of(name, compare(seen.gradient, right), detail), seen, right


def check_of(name: str, found: Compared, detail: str = "") -> Check:
    at = f"worst at {found.name}" if found.ratio else "no difference"
    if not math.isfinite(found.figure):
        at = found.name
    return Check(name, found.figure, found.limit, "relative", ROUNDING, f"{at}, {detail}" if detail else at)


def precision_checks(problem: Problem, name: str) -> list[Check]:
    """The gradient and its addition in the run's own precision, `name`."""
    inside: dict[str, list[float]] = {}
    outside: dict[str, list[float]] = {}
    additions: list[tuple[str, float, float]] = []
    alone: dict[str, float] = {}
    shares: dict[str, float] = {}
    for number in range(WINDOWS):
        batch, _ = shuffled(problem.batches[number % len(problem.batches)], number)
        exact = in_precision(problem, narrowed(problem.model, DOUBLE), cast(batch, DOUBLE), DOUBLE).gradient
        size = norm(exact) or 1.0
        start = Start(problem, problem.dtype)
        seen = first_update(start, cast(batch, problem.dtype), arrivals=True)
        if not all(all_gather(seen.gradient is not None)):
            return [Check(f"gradient, {name}", math.inf, 0.0, "relative", NEAREST, "no update was made")]
        assert seen.gradient is not None
        right = clipped(exact, problem.clip_norm)
        factor = (norm(right) or 1.0) / size
        _add(inside, norms_of_errors(seen.gradient, right), 1 / (size * factor))
        if ranks() == 1 and seen.arrived:
            additions.append(_addition(problem, seen))
        rounded = roundings(problem, seen)
        scale = loss_scale_of(problem, seen, exact)
        if not number:
            alone = _parts(problem, batch, seen, scale)
        for order, numbers in ((batch, None), shuffled(batch, 100 + number)):
            model = narrowed(problem.model, problem.dtype)
            larger = rough_in_precision(problem, model, order, scale, numbers)
            _add(outside, norms_of_errors(larger.gradient, exact), 1 / size)
        # What N roundings of the micro-batches' parts add to the one of the larger batch's, and clipping.
        clip = clipping(problem.clip_norm, exact, problem.dtype)
        for key, errors in outside.items():
            own = norm(exact) if key == WHOLE else float(exact[key].norm())
            if factor < 1:
                shares[key] = max(shares.get(key, 0.0), own / size)
            errors[-1] += (rounded.get(key, 0.0) / factor + alone.get(key, 0.0) + clip * own) / size
    nearest = {key: worst(all_gather(_nearest(errors))) for key, errors in inside.items()}
    farthest = {
        key: max(errors) if all(map(math.isfinite, errors)) else -1.0 for key, errors in outside.items()
    }
    # The norm that clips is off by no more than the gradient is, and with it every part.
    off = farthest[WHOLE]
    farthest = {key: limit + shares.get(key, 0.0) * off for key, limit in farthest.items()}
    at = max(nearest, key=lambda key: _order(_over(nearest[key], farthest[key])))
    checks = [
        Check(f"gradient, {name}", nearest[at], farthest[at], "relative", NEAREST, f"worst at {at}"),
    ]
    if additions:
        at, error, bound = max(additions, key=lambda found: _order(_over(found[1], found[2])))
        checks.append(Check(f"addition, {name}", error, bound, "relative", ONCE, f"worst at {at}"))
    return checks


def norms_of_errors(found: Gradient, right: Gradient) -> dict[str, float]:
    """The 2-norm of each parameter's error, and of all of it."""
    errors = {name: float((found[name].double() - g).norm()) for name, g in right.items()}
    return {**errors, WHOLE: math.sqrt(sum(error * error for error in errors.values()))}


def _add(lists: dict[str, list[float]], values: dict[str, float], times: float) -> None:
    for key, value in values.items():
        lists.setdefault(key, []).append(value * times)


def _nearest(errors: list[float]) -> float:
    finite = [error for error in errors if not math.isnan(error)]
    return min(finite, default=math.nan)


def first_update(start: Start, batch: Batch, arrivals: bool = False) -> Observation:
    """The first window that a loop does not skip: a loss scale may have to fall before."""
    seen = observe(start, batch, arrivals=arrivals)
    for _ in range(TRIES if start.problem.scaling else 0):
        if max(all_gather(seen.steps)):
            break
        seen = observe(start, batch, arrivals=arrivals)
    return seen


def loss_scale_of(problem: Problem, seen: Observation, exact: Gradient) -> float:
    """A power of two near the loop's loss scale, 1 without one: what arrived, over the right gradient."""
    if problem.scaling is None or not all(all_gather(bool(seen.arrived))):
        return 1.0
    top = sum(all_gather(sum(float((exact[name] * a).sum()) for name, a in seen.arrived.items())))
    below = norm(exact) ** 2
    return 2.0 ** round(math.log2(top / below)) if top > 0 and below > 0 else 1.0


def _parts(problem: Problem, batch: Batch, seen: Observation, scale: float) -> dict[str, float]:
    """What the micro-batches of a window lose by themselves in the run's precision, added up."""
    every = [micro for found in all_gather(seen.micro_batches) for micro in found]
    if any(micro is None for micro in every):
        return {}
    model, fine = narrowed(problem.model, problem.dtype), narrowed(problem.model, DOUBLE)
    lost: dict[str, float] = {}
    for ids in every:
        if ids:
            own, _ = part_in_precision(problem, model, batch, ids, problem.dtype, problem.autocast, scale)
            exact, _ = part_in_precision(problem, fine, batch, ids, DOUBLE)
            for key, error in norms_of_errors(own, exact).items():
                lost[key] = lost.get(key, 0.0) + error
    return lost


def roundings(problem: Problem, seen: Observation) -> dict[str, float]:
    """The norms that rounding each micro-batch's part of each rank, and adding the parts, can add at most.

    Parts are added in fp32 on a rank, and over the ranks in the gradient's dtype. Of shards nothing arrives.
    """
    found = seen.gradient
    if not all(all_gather(bool(seen.arrived) and found is not None)):
        return {}
    assert found is not None
    top = sum(all_gather(sum(float((found[name].double() * a).sum()) for name, a in seen.arrived.items())))
    factor = abs(norm(found) ** 2 / top) if top else 0.0
    added = max(0, seen.arrivals - 1) * U32 + (ranks() - 1) * roundoff(problem.dtype)
    factor *= roundoff(problem.autocast or problem.dtype) + added
    every = all_gather(seen.arrived_norms)
    parts = {name: factor * sum(norms.get(name, 0.0) for norms in every) for name in found}
    return {**parts, WHOLE: math.hypot(*parts.values())}


def _factor(found: Gradient, arrived: Gradient) -> float:
    """The number by which `found` is a multiple of `arrived`: 1, or what unscaling and clipping made."""
    top = sum(float((found[name].double() * a).sum()) for name, a in arrived.items())
    below = sum(float(a.square().sum()) for a in arrived.values())
    return top / below if below else 1.0


def _addition(problem: Problem, seen: Observation) -> tuple[str, float, float]:
    """(parameter, error, bound) of the worst sum, relative to the whole gradient."""
    assert seen.gradient is not None
    factor = _factor(seen.gradient, seen.arrived)
    size = norm(seen.gradient) or 1.0
    # Unscaling and clipping round every number once more.
    again = problem.clip_norm is not None or problem.scaling is not None
    errors, bounds, sizes = {}, {}, {}
    for name, arrived in seen.arrived.items():
        dtype = seen.gradient[name].dtype
        sizes[name] = abs(factor) * float(arrived.norm())
        errors[name] = float((seen.gradient[name].double() - arrived * factor).norm())
        once = abs(factor) * float((arrived.to(dtype).double() - arrived).norm())
        terms = abs(factor) * seen.arrived_norms[name]
        bounds[name] = once + max(0, seen.arrivals - 1) * U32 * terms + again * roundoff(dtype) * sizes[name]
    # The factor is itself found from rounded numbers: by Cauchy and Schwarz it is off by their error at most.
    slack = math.sqrt(sum(b * b for b in bounds.values()) / (sum(s * s for s in sizes.values()) or 1.0))
    bounds = {name: bound + slack * sizes[name] for name, bound in bounds.items()}
    name = max(errors, key=lambda key: _order(_over(errors[key], bounds[key])))
    return name, errors[name] / size, bounds[name] / size


def _order(ratio: float) -> float:
    return math.inf if math.isnan(ratio) else ratio
