"""The loop's gradient in the run's own precision, and the rounding errors that a correct one may have."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

from .certificate import Check, excess, worst_check
from .float64 import DOUBLE
from .gradients import WHOLE, first_update, measured_loss_scale, norms_of_errors
from .larger_batch import Gradient, clamped, clipped, dot, norm
from .observation import Observation
from .problem import Problem, TrainingState, WholeBatch, cast, copy_in
from .ranks import all_gather, world_size, worst
from .replay import BITS, ONE_STEP, Replay
from .rounding import (
    LAMBDA,
    LARGER_BATCHES,
    U32,
    WINDOWS,
    clipping_error,
    larger_batch_of,
    part_gradient,
    roundoff,
    scaled_larger_batch,
    shuffled,
)

NEAREST = (
    f"the larger batch's own distance from its fp64 gradient: the window's nearest of {WINDOWS} against the "
    f"larger batch's farthest of {LARGER_BATCHES}, and what its micro-batches lose by themselves"
)
ONCE = (
    "adding in fp32 what autograd delivers, and rounding the sum once: (N-1) u of the terms' norms, and the "
    "rounding itself"
)
COARSE = (
    f"{LAMBDA:g} times what the larger batch loses in this precision and rounding the micro-batches' parts "
    "adds, the nearest of each kind of window, because a single rounding may switch a unit"
)


def precision_checks(problem: Problem, name: str) -> list[Check]:
    """Checks the gradient and its accumulation in the run's own precision, `name`."""
    # By parameter and of the whole gradient, an entry for each pass.
    window_errors: dict[str, list[float]] = defaultdict(list)
    larger_errors: dict[str, list[float]] = defaultdict(list)
    additions: list[Check] = []
    parts: dict[str, float] = {}
    shares: dict[str, float] = defaultdict(float)
    for number in range(WINDOWS):
        batch, _ = shuffled(problem.batches[number % len(problem.batches)], number)
        exact = larger_batch_of(problem, copy_in(problem.model, DOUBLE), batch).gradient
        size = norm(exact) or 1.0
        state = TrainingState(problem, problem.dtype)
        observation = first_update(state, cast(batch, problem.dtype), arrivals=True)
        if not all(all_gather(observation.gradient is not None)):
            return [Check(f"gradient, {name}", math.inf, 0.0, "relative", NEAREST, "no update was made")]
        assert observation.gradient is not None
        expected = clipped(exact, problem.clip_norm)
        factor = (norm(expected) or 1.0) / size
        expected = clamped(expected, problem.clip_value)
        _append(window_errors, norms_of_errors(observation.gradient, expected), 1 / (size * factor))
        if world_size() == 1 and observation.arrived:
            additions.append(_addition_check(problem, observation, name))
        rounded = rounding_of_parts(problem, observation)
        scale = loss_scale_of(problem, observation, exact)
        if not number:
            parts = _losses_of_parts(problem, batch, observation, scale)
        for order, numbers in ((batch, None), shuffled(batch, 100 + number)):
            model = copy_in(problem.model, problem.dtype)
            larger = scaled_larger_batch(problem, model, order, scale, numbers)
            _append(larger_errors, norms_of_errors(larger.gradient, exact), 1 / size)
        # Added: what rounding and clipping N parts adds to the single rounding of the larger batch.
        clip = clipping_error(problem.clip_norm, exact, problem.dtype)
        for key, errors in larger_errors.items():
            length = size if key == WHOLE else float(exact[key].norm())
            if factor < 1:
                shares[key] = max(shares[key], length / size)
            errors[-1] += (rounded.get(key, 0.0) / factor + parts.get(key, 0.0) + clip * length) / size
    nearest = {}
    for key, errors in window_errors.items():
        numbers = [error for error in errors if not math.isnan(error)]
        nearest[key] = worst(all_gather(min(numbers, default=math.nan)))
    # The relative error of the clipping norm is at most the gradient's, and scales every parameter's part.
    whole = max(larger_errors[WHOLE])
    bounds = {key: max(errors) + shares[key] * whole for key, errors in larger_errors.items()}
    at = max(nearest, key=lambda key: excess(nearest[key], bounds[key]))
    detail = f"worst at {at}"
    overflows = [key for key, errors in larger_errors.items() if not all(map(math.isfinite, errors))]
    if overflows:  # nothing to compare with: an infinite bound fails the check
        at, bounds[overflows[0]] = overflows[0], math.inf
        detail = f"the larger batch, or a part of it, overflows at {at}"
    checks = [Check(f"gradient, {name}", nearest[at], bounds[at], "relative", NEAREST, detail)]
    return [*checks, worst_check(additions)] if additions else checks


def _append(lists: dict[str, list[float]], values: dict[str, float], factor: float) -> None:
    for key, value in values.items():
        lists[key].append(value * factor)


class OwnPrecisionReplay(Replay):
    """Compares a loop's updates in the run's own precision."""

    def __init__(self, problem: Problem, state: TrainingState) -> None:
        super().__init__(problem, state, problem.dtype)
        # Of the whole gradient, by kind of window: first, following, smaller.
        self._gradients: dict[str, list[Check]] = defaultdict(list)

    def compare(self, batch: WholeBatch, observation: Observation) -> None:
        if self.diverged:
            return
        if self.problem.scaling is not None and not max(all_gather(observation.steps)):
            self._step_schedule()  # the loss scale overflowed and the window was skipped
            return
        number = self.updates + 1
        smaller = self._is_smaller(batch)
        if all(all_gather(observation.gradient is not None)):
            error, bound = self._gradient_error(batch, observation)
            if not math.isfinite(bound):
                self.diverged = True
                return
            kind = "smaller" if smaller else "first" if number == 1 else "following"
            at = f"update {number}, nearest of the {kind} windows"
            self._gradients[kind].append(Check("gradient", error, bound, "relative", COARSE, at))
        self.updates = number
        self._record("number of updates", abs(observation.steps - 1))
        self._step_optimizer(observation)
        self._step_schedule()
        parameters, optimizer = self._take_over()
        if observation.unscaled_by_optimizer:
            return  # the division in a fused optimizer rounds elsewhere
        for name, figure in parameters.items():
            self._record("optimizer", figure, f" at {name}")
        for key, figure in optimizer.items():
            self._record("optimizer", figure, f" at optimizer {key}")

    def _gradient_error(self, batch: WholeBatch, observation: Observation) -> tuple[float, float]:
        """(error of the whole gradient, its bound), both relative to it."""
        problem = self.problem
        assert observation.gradient is not None
        exact = larger_batch_of(problem, copy_in(self.model, DOUBLE), batch).gradient
        scale = loss_scale_of(problem, observation, exact)
        coarse = scaled_larger_batch(problem, self.model, batch, scale).gradient
        expected = clipped(exact, problem.clip_norm)
        length = norm(expected) or 1.0
        expected = clamped(expected, problem.clip_value)
        error = norms_of_errors(observation.gradient, expected)[WHOLE] / length
        lost = norms_of_errors(coarse, exact)[WHOLE] / (norm(exact) or 1.0)
        lost += rounding_of_parts(problem, observation).get(WHOLE, 0.0) / length
        u = roundoff(problem.autocast or problem.dtype)
        bound = LAMBDA * (lost + u) + clipping_error(problem.clip_norm, exact, problem.dtype)
        return worst(all_gather(error)), max(all_gather(bound))

    def checks(self, name: str) -> list[Check]:
        """The worst figures in precision `name`. A collective call."""
        over = f"{self.updates} updates, {name}"
        if not self._gradients and self.diverged:
            return []
        if not self._gradients:
            return [Check(f"gradient, {over}", math.inf, 0.0, "relative", COARSE, "no update was made")]
        nearest = [min(checks, key=lambda check: check.excess) for checks in self._gradients.values()]
        return [
            replace(worst_check(nearest), name=f"gradient, {over}"),
            self._check(f"optimizer, {over}", "optimizer", self._bit_bound, BITS),
            self._check(f"number of updates, {name}", "number of updates", 0.0, ONE_STEP, "count"),
        ]


def loss_scale_of(problem: Problem, observation: Observation, exact: Gradient) -> float:
    """A power of two near the loop's loss scale; 1 without one."""
    if problem.scaling is None or not all(all_gather(bool(observation.arrived))):
        return 1.0
    scale = measured_loss_scale(observation, exact)
    return 2.0 ** round(math.log2(scale)) if scale > 0 else 1.0


def _losses_of_parts(
    problem: Problem, batch: WholeBatch, observation: Observation, scale: float
) -> dict[str, float]:
    """The sums of what a window's micro-batches lose by themselves in the run's precision, by parameter."""
    micro_batches = [numbers for each in all_gather(observation.micro_batches) for numbers in each]
    if any(numbers is None for numbers in micro_batches):
        return {}
    coarse, fine = copy_in(problem.model, problem.dtype), copy_in(problem.model, DOUBLE)
    losses: dict[str, float] = defaultdict(float)
    for numbers in micro_batches:
        if numbers:
            gradient, _ = part_gradient(problem, coarse, batch, numbers, problem.autocast, scale)
            exact, _ = part_gradient(problem, fine, batch, numbers)
            for key, error in norms_of_errors(gradient, exact).items():
                losses[key] += error
    return losses


def rounding_of_parts(problem: Problem, observation: Observation) -> dict[str, float]:
    """Bounds of what rounding each micro-batch's part on each rank, and adding the parts, adds, by parameter.

    Parts are added in fp32 on a rank, and over the ranks in the gradient's dtype. Empty for sharded
    parameters, at which no gradient arrives.
    """
    gradient = observation.gradient
    if not all(all_gather(bool(observation.arrived) and gradient is not None)):
        return {}
    assert gradient is not None
    kept = unclamped(gradient, problem.clip_value)
    product = sum(all_gather(dot(observation.arrived, kept)))
    factor = abs(norm(kept) ** 2 / product) if product else 0.0
    added = max(0, observation.arrivals - 1) * U32 + (world_size() - 1) * roundoff(problem.dtype)
    factor *= roundoff(problem.autocast or problem.dtype) + added
    norms = all_gather(observation.arrived_norms)
    bounds = {name: factor * sum(each.get(name, 0.0) for each in norms) for name in gradient}
    return {**bounds, WHOLE: math.hypot(*bounds.values())}


def unclamped(gradient: Gradient, clip_value: float | None) -> Gradient:
    """`gradient` with zeros where it may have been clamped: what is left shows the factor before that."""
    if clip_value is None:
        return gradient
    return {name: g.where(g.abs() < 0.99 * clip_value, 0.0) for name, g in gradient.items()}


def _addition_check(problem: Problem, observation: Observation, precision: str) -> Check:
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
    square = dot(base, base)
    factor = dot(base, kept) / square if square else 1.0
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
        bounds[name] = once + added + rounded_again * roundoff(dtype) * sizes[name]
    # The factor follows from rounded numbers: by Cauchy and Schwarz it is off by their error at most.
    whole = factor * factor * square or 1.0
    slack = math.sqrt(sum(b * b for b in bounds.values()) / whole)
    bounds = {name: bound + slack * sizes[name] for name, bound in bounds.items()}
    name = max(errors, key=lambda key: excess(errors[key], bounds[key]))
    error, bound = errors[name] / size, bounds[name] / size
    return Check(f"addition, {precision}", error, bound, "relative", ONCE, f"worst at {name}")
