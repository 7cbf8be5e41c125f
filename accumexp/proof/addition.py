"""Whether a loop adds the gradients of its micro-batches in enough precision."""

from __future__ import annotations

from .certificate import Check, excess
from .float64 import DOUBLE
from .gradients import first_update
from .larger_batch import clamped, dot, norm, unclamped
from .observation import Observation
from .problem import Problem, TrainingState, WholeBatch, cast
from .ranks import world_size
from .rounding import (
    U32,
    roundoff,
)

# Parameters that are named one by one; more are counted.
NAMED = 3
ONCE = (
    "adding in fp32 what autograd delivers, and rounding the sum once: (N-1) u of the terms' norms, and the "
    "rounding itself"
)


def addition_check(
    problem: Problem, observation: Observation, batch: WholeBatch, precision: str
) -> Check | None:
    """Checks the addition of gradients; None for a loop that weighs each micro-batch's after backward."""
    if not _adds_what_arrives(problem, observation):
        return None
    check = _sum_check(problem, observation, precision)
    if check.passed:
        return check
    exact = first_update(TrainingState(problem, DOUBLE), cast(batch, DOUBLE), arrivals=True)
    adds = _adds_what_arrives(problem, exact) and _sum_check(problem, exact, precision).passed
    return check if adds else None


def _sum_check(problem: Problem, observation: Observation, precision: str) -> Check:
    """Checks `.grad` against the sum of what autograd delivered; figures relative to the whole gradient."""
    gradient, arrived = observation.gradient, observation.arrived
    assert gradient is not None
    # The gradient over what arrived: 1, or what unscaling and clipping made of it.
    kept = unclamped(gradient, problem.clip_value)
    base = (
        {name: exact * (kept[name] != 0) for name, exact in arrived.items()}
        if problem.clip_value
        else arrived
    )
    # The median over the parameters: one that is added wrongly must not move it.
    factors = {n: dot({n: g}, kept) / dot({n: g}, {n: g}) for n, g in base.items() if bool(g.any())}
    factor = sorted(factors.values())[len(factors) // 2] if factors else 1.0
    size = norm(gradient) or 1.0
    rounded_again = problem.clip_norm is not None or problem.scaling is not None
    errors, bounds, sizes = {}, {}, {}
    for name, exact in arrived.items():
        dtype = gradient[name].dtype
        sizes[name] = abs(factor) * float(exact.norm())
        expected = clamped({name: exact * factor}, problem.clip_value)[name]
        errors[name] = float((gradient[name].double() - expected).norm())
        once = abs(factor) * float((exact.to(dtype).double() - exact).norm())
        terms = abs(factor) * observation.arrived_norms[name]
        added = max(0, observation.arrivals - 1) * U32 * terms
        # Next to a tie, the error of the sum makes it round to the other side, and counts twice.
        bounds[name] = once + 2 * added + rounded_again * roundoff(dtype) * sizes[name]
    # Each parameter's factor is off by its own bound at most; so at least half of the parameters have bounds
    # as large as the error of the median.
    slacks = sorted(bounds[name] / sizes[name] for name in factors if sizes[name])
    slack = slacks[len(slacks) // 2] if slacks else 0.0
    bounds = {name: bound + slack * sizes[name] for name, bound in bounds.items()}
    name = max(errors, key=lambda key: excess(errors[key], bounds[key]))
    error, bound = errors[name] / size, bounds[name] / size
    failing = [key for key in errors if not errors[key] <= bounds[key]]
    others = f", {len(failing)} of {len(errors)} parameters" if len(failing) > 1 else ""
    if 1 < len(failing) <= NAMED and len(failing) < len(errors):
        others += f" ({', '.join(failing)})"
    others = ", no other" if len(failing) == 1 and len(errors) > 1 else others
    return Check(f"addition, {precision}", error, bound, "relative", ONCE, f"worst at {name}{others}")


def _adds_what_arrives(problem: Problem, observation: Observation) -> bool:
    """Whether the gradient is the sum of what autograd delivered, up to scaling and clipping."""
    changed = problem.transform_gradient is not None or problem.perturb is not None
    return (
        world_size() == 1 and bool(observation.arrived) and observation.gradient is not None and not changed
    )
