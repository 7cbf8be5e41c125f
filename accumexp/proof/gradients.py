"""The window's gradient compared with the larger batch's in fp64."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .certificate import Check, excess
from .float64 import DOUBLE
from .larger_batch import Gradient, dot, norm
from .observation import Observation, observe
from .problem import Problem, TrainingState, WholeBatch, cast, copy_in
from .ranks import all_gather, world_size
from .rounding import ROUNDING, WHOLE, ExpectedUpdate, expected_update, norms_of_errors

# Windows that a loop may skip before one counts: a loss scale of 2^16 is below 1 after that many halvings.
MAX_SKIPPED = 24


@dataclass(frozen=True)
class Comparison:
    """A gradient compared with the expected one.

    Attributes:
        error: of the whole gradient, relative to the larger batch's; the worst rank's.
        ratio: the worst parameter's error over its bound; at most 1 where the gradients are equal.
        name: that parameter.
        figure, bound: its error and bound, relative to the whole gradient's norm.
    """

    error: float
    ratio: float
    name: str
    figure: float
    bound: float

    @property
    def equal(self) -> bool:
        return self.ratio <= 1

    def as_check(self, name: str, detail: str = "") -> Check:
        at = f"worst at {self.name}" if self.ratio else "no difference"
        if not math.isfinite(self.figure):
            at = self.name
        detail = f"{at}, {detail}" if detail else at
        return Check(name, self.figure, self.bound, "relative", ROUNDING, detail)


def compare(gradient: Gradient | None, expected: ExpectedUpdate) -> Comparison:
    """Compares parameter by parameter; the result of the worst rank. A collective call."""
    return max(all_gather(_compare(gradient, expected)), key=lambda comparison: comparison.ratio)


def _compare(gradient: Gradient | None, expected: ExpectedUpdate) -> Comparison:
    if gradient is None:
        return Comparison(math.inf, math.inf, "no update was made", math.inf, 0.0)
    if gradient.keys() != expected.gradient.keys():
        return Comparison(math.inf, math.inf, "other parameters", math.inf, 0.0)
    size = norm(expected.gradient) or 1.0
    errors = norms_of_errors(gradient, expected.gradient)
    error = errors.pop(WHOLE) / size
    ratios = {name: excess(errors[name], expected.bounds[name]) for name in errors}
    name = max(ratios, key=lambda key: ratios[key])
    return Comparison(error, ratios[name], name, errors[name] / size, expected.bounds[name] / size)


def arrives_scaled(observation: Observation, exact: Gradient) -> bool:
    """Whether the finite part of what arrived is a multiple of `exact`; not measured on several ranks."""
    finite = {name: g for name, g in observation.arrived.items() if bool(g.isfinite().all())}
    right = {name: exact[name] for name in finite}
    return world_size() > 1 or common_factor(finite, right) is not None


def common_factor(gradient: Gradient | None, right: Gradient) -> float | None:
    """The factor by which all of `gradient` is the `right` one but for rounding; None if there is none."""
    square = norm(right) ** 2
    if gradient is None or gradient.keys() != right.keys() or not square:
        return None
    factor = dot(right, gradient) / square
    left = norm({name: gradient[name].double() - factor * g.double() for name, g in right.items()})
    return factor if left <= 1e-6 * abs(factor) * math.sqrt(square) else None


def compare_window(
    problem: Problem, batch: WholeBatch, state: TrainingState | None = None
) -> tuple[Comparison, Observation, ExpectedUpdate]:
    """Compares the gradient on `batch` in fp64, in the first window of `state` or of a fresh one."""
    batch = cast(batch, DOUBLE)
    expected = expected_update(problem, batch, copy_in(problem.model, DOUBLE), problem.clip_norm)
    observation = observe(state or TrainingState(problem, DOUBLE), batch)
    return compare(observation.gradient, expected), observation, expected


def first_update(state: TrainingState, batch: WholeBatch, arrivals: bool = False) -> Observation:
    """The first window that the loop does not skip because its loss scale overflows."""
    skips_left = MAX_SKIPPED if state.problem.scaling else 0
    while True:
        observation = observe(state, batch, arrivals=arrivals)
        if not skips_left or max(all_gather(observation.steps)):
            return observation
        skips_left -= 1


def measured_loss_scale(observation: Observation, exact: Gradient) -> float:
    """The loop's loss scale over the number by which ranks divide: what arrived, over the exact gradient.

    Counts the parameters whose gradient is finite on all ranks. 0 if nothing arrived. A collective call.
    """
    overflowed = {name for name, arrived in observation.arrived.items() if not arrived.isfinite().all()}
    overflowed = set().union(*all_gather(overflowed))
    finite = {name: g for name, g in exact.items() if name not in overflowed}
    return sum(all_gather(dot(finite, observation.arrived))) / (norm(finite) ** 2 or 1.0)
