"""The loop's gradient in the run's own precision, and the rounding errors that a correct one may have.

An update is compared with its own micro-batches, which are computed again in the same precision on the same
rows: a rounding that switches a ReLU in the loop switches it there too. docs/proof.md derives the bound.
"""

from __future__ import annotations

import math
from dataclasses import replace

from torch import nn

from .addition import addition_check
from .certificate import Check, Series, worst_check
from .evidence import Failure, updates_in_words
from .float64 import DOUBLE
from .gradients import Comparison, compare, compare_window, first_update, measured_loss_scale
from .larger_batch import Gradient, clamped, clipped, dot, norm, unclamped
from .loss_shares import LossShares, loss_shares
from .micro_batches import even_micro_batches, is_partition, rank_micro_batches
from .nested import batch_size
from .observation import Observation
from .problem import Problem, TrainingState, WholeBatch, cast, copy_in
from .ranks import all_gather, world_size
from .replay import BITS, ONE_STEP, Replay
from .rounding import (
    FEW,
    LAMBDA,
    SMALLEST_SCALE,
    U32,
    WHOLE,
    ExpectedUpdate,
    clipped_bounds,
    growth,
    larger_batch_of,
    norms_of_errors,
    part_gradient,
    perturbed_model,
    roundoff,
    scaled_larger_batch,
    shuffled,
    transformed,
)

# Single windows from the first weights, each on the samples in another order.
WINDOWS = 2
LOST = (
    f"in every update, {LAMBDA:g} times what the larger batch and the window's own micro-batches lose in "
    f"this precision, and {LAMBDA:g} u"
)


def precision_checks(problem: Problem, name: str) -> list[Check]:
    """Checks the gradient and its accumulation in the run's own precision, `name`."""
    gradients, additions = [], []
    for number in range(WINDOWS):
        batch, _ = shuffled(problem.batches[number % len(problem.batches)], number)
        state = TrainingState(problem, problem.dtype)
        observation = first_update(state, cast(batch, problem.dtype), arrivals=True)
        comparison, _ = compare_own_precision(
            problem, copy_in(problem.model, problem.dtype), batch, observation
        )
        gradients.append(_check(comparison, f"gradient, {name}"))
        addition = addition_check(problem, observation, batch, name)
        additions += [addition] if addition else []
    checks = [worst_check(gradients)]
    return [*checks, worst_check(additions)] if additions else checks


def failure_in_another_order(problem: Problem) -> Failure | None:
    """The failure in fp64 of the windows that `precision_checks` makes, whose samples are shuffled."""
    for number in range(WINDOWS):
        batch, _ = shuffled(problem.batches[number % len(problem.batches)], number)
        comparison, observation, expected = compare_window(problem, batch)
        if not comparison.equal:
            model = copy_in(problem.model, DOUBLE)
            failure = Failure(cast(batch, DOUBLE), observation, expected, comparison, model)
            failure.window = "the batch's samples in another order"
            return failure
    return None


def compare_own_precision(
    problem: Problem, model: nn.Module, batch: WholeBatch, observation: Observation
) -> tuple[Comparison, ExpectedUpdate]:
    """Compares the gradient on `batch` from the weights of `model`, which has the run's own precision.

    The bound is infinite if the larger batch, or a part of it, overflows. A collective call.
    """
    fine = copy_in(model, DOUBLE)
    larger = larger_batch_of(problem, perturbed_model(problem, fine, batch), batch)
    exact = larger.gradient
    scale = loss_scale_of(problem, observation, exact)
    coarse_model = perturbed_model(problem, model, batch, problem.autocast)
    coarse = scaled_larger_batch(problem, coarse_model, batch, scale).gradient
    u = roundoff(problem.autocast or problem.dtype)
    window = _window_of_parts(problem, coarse_model, batch, observation, scale)
    lost_at_once, lost_in_parts = norms_of_errors(coarse, exact), norms_of_errors(window, exact)
    if not lost_in_parts[WHOLE] <= math.sqrt(u) * norm(exact):
        # Parts that are not the window's, of modules that couple samples, still show what rounding loses.
        in_fp64 = replace(problem, autocast=None, scaling=None)
        fine_model = perturbed_model(problem, fine, batch)
        fine_window = _window_of_parts(in_fp64, fine_model, batch, observation, 1.0)
        lost_in_parts = norms_of_errors(window, fine_window)
    lost = {name: max(lost_at_once[name], lost_in_parts[name]) for name in lost_at_once}
    gradient = transformed(problem, fine, exact)
    grown = growth(problem, fine, coarse, exact, gradient, lost_at_once)
    bounds = {
        name: grown[name] * LAMBDA * (lost[WHOLE if g.numel() < FEW else name] + u * float(g.norm()))
        for name, g in gradient.items()
    }
    bounds = clipped_bounds(bounds, gradient, problem.clip_norm, problem.dtype)
    added = rounding_of_parts(problem, observation)
    bounds = {name: bound + added.get(name, 0.0) for name, bound in bounds.items()}
    expected = clamped(clipped(gradient, problem.clip_norm), problem.clip_value)
    update = ExpectedUpdate(larger, expected, norm(gradient), bounds, math.inf)
    comparison = compare(observation.gradient, update)
    overflowed = next((name for name, bound in bounds.items() if not math.isfinite(bound)), None)
    if overflowed is not None:
        comparison = Comparison(math.inf, math.inf, overflowed, comparison.figure, math.inf)
    return comparison, update


def _window_of_parts(
    problem: Problem, model: nn.Module, batch: WholeBatch, observation: Observation, scale: float
) -> Gradient:
    """The sum in fp64 of the window's micro-batches' gradients, each computed by `model` by itself."""
    samples = batch_size(batch)
    micro_batches = rank_micro_batches(batch, observation)
    if micro_batches is None or not is_partition(micro_batches, samples):
        micro_batches = even_micro_batches(problem, samples)
    total: Gradient = {}
    parts = [part for of_rank in micro_batches for part in of_rank if part]
    shares = loss_shares(problem, model, batch, parts, problem.autocast)
    for numbers in parts:
        part = scaled_part(problem, model, batch, numbers, scale, shares)
        total = {name: g.double() + total[name] if total else g.double() for name, g in part.items()}
    return total


class OwnPrecisionReplay(Replay):
    """Compares a loop's updates in the run's own precision.

    Attributes:
        failure: the first update whose gradient differs by more than rounding.
    """

    def __init__(self, problem: Problem, state: TrainingState) -> None:
        super().__init__(problem, state, problem.dtype)
        self.failure: Failure | None = None
        self._comparisons: list[tuple[int, Comparison]] = []
        self._additions: list[tuple[int, Check]] = []
        self._previous: Gradient | None = None

    def compare(self, batch: WholeBatch, observation: Observation) -> None:
        if self.diverged:
            return
        if self.problem.scaling is not None and not max(all_gather(observation.steps)):
            self._step_schedule()  # the loss scale overflowed and the window was skipped
            return
        number = self.updates + 1
        with self.problem.outside_as(dict(observation.outside)):
            comparison, expected = compare_own_precision(self.problem, self.model, batch, observation)
        if not math.isfinite(comparison.bound) and all(all_gather(observation.gradient is not None)):
            self.diverged = True
            return
        self._comparisons.append((number, comparison))
        if not comparison.equal and self.failure is None:
            model = copy_in(self.model, DOUBLE)
            self.failure = Failure(batch, observation, expected, comparison, model, self._previous)
            self.failure.precision = self.problem.precision_name
            self.failure.tolerance = max(self.failure.tolerance, 2 * self._whole_bound(expected))
        self._previous = observation.gradient
        if addition := addition_check(self.problem, observation, batch, f"update {number}"):
            self._additions.append((number, addition))
        self._is_smaller(batch)
        self.updates = number
        self._record("number of updates", abs(observation.steps - 1))
        self._step_optimizer(observation)
        self._step_schedule()
        parameters, optimizer = self._take_over()
        if observation.unscaled_by_optimizer:
            return  # the division in a fused optimizer rounds elsewhere
        for name, figure in parameters.items():
            if name not in self.problem.hand_changed:
                self._record("optimizer", figure, f" at {name}")
        for key, figure in optimizer.items():
            self._record("optimizer", figure, f" at optimizer {key}")

    def checks(self, name: str) -> list[Check]:
        """The worst figures in precision `name`. A collective call."""
        over = f"{self.updates} updates, {name}"
        if not self._comparisons and self.diverged:
            return []
        checks = [worst_check(_check(c, f"gradient, {over}", f"update {n}") for n, c in self._comparisons)]
        if self._additions:
            worst = worst_check(check for _, check in self._additions)
            failing = [number for number, check in self._additions if not check.passed]
            # Of a window whose micro-batches are weighed after backward the gradient alone can be checked.
            numbers = {number for number, _ in self._additions}
            wrong = [n for n, c in self._comparisons if n not in numbers and not c.equal]
            compared = sorted({*numbers, *wrong})
            when = updates_in_words(sorted({*failing, *wrong}), compared) if failing else ""
            detail = ", ".join(filter(None, (worst.detail, when)))
            checks.append(replace(worst, name=f"addition, {over}", detail=detail))
        checks.append(self._check(f"optimizer, {over}", "optimizer", self._bit_bound, BITS))
        checks.append(self._check(f"number of updates, {name}", "number of updates", 0.0, ONE_STEP, "count"))
        if self.failure is not None:
            self.failure.compared = [number for number, _ in self._comparisons]
            self.failure.updates = [number for number, c in self._comparisons if not c.equal]
        return checks

    def series(self, name: str) -> Series:
        return Series(
            f"gradient, {name}",
            "relative",
            [number for number, _ in self._comparisons],
            [c.figure for _, c in self._comparisons],
            [c.bound for _, c in self._comparisons],
        )

    def _whole_bound(self, expected: ExpectedUpdate) -> float:
        return math.hypot(*expected.bounds.values()) / (norm(expected.gradient) or 1.0)


def _check(comparison: Comparison, name: str, detail: str = "") -> Check:
    at = f"worst at {comparison.name}" if math.isfinite(comparison.figure) else comparison.name
    if not math.isfinite(comparison.bound):
        at = f"the larger batch, or a part of it, overflows at {comparison.name}"
    detail = ", ".join(part for part in (at, detail) if part)
    return Check(name, comparison.figure, comparison.bound, "relative", LOST, detail)


def scaled_part(
    problem: Problem,
    model: nn.Module,
    batch: WholeBatch,
    numbers: list[int],
    scale: float,
    shares: LossShares | None = None,
) -> Gradient:
    """The gradient of samples `numbers` as the run computes it, at a loss scale without overflow."""
    share = shares and shares.of(numbers)
    while True:
        part, _ = part_gradient(problem, model, batch, numbers, problem.autocast, scale, share)
        finite = all(bool(g.isfinite().all()) for g in part.values())
        if finite or problem.scaling is None or scale < SMALLEST_SCALE:
            return part
        scale /= 16


def loss_scale_of(problem: Problem, observation: Observation, exact: Gradient) -> float:
    """A power of two near the loop's loss scale; 1 without one."""
    if problem.scaling is None or not all(all_gather(bool(observation.arrived))):
        return 1.0
    scale = measured_loss_scale(observation, exact)
    return 2.0 ** round(math.log2(scale)) if scale > 0 else 1.0


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
