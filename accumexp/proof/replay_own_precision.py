"""The replay of updates in the run's own precision, which shows errors of buffers that fp64 runs lack."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

from .certificate import Check, worst_check
from .float64 import DOUBLE
from .gradients import WHOLE, norms_of_errors
from .larger_batch import clamped, clipped, norm
from .observation import Observation
from .own_precision import loss_scale_of, rounding_of_parts
from .problem import Problem, TrainingState, WholeBatch, copy_in
from .ranks import all_gather, worst
from .replay import BITS, ONE_STEP, Replay
from .rounding import LAMBDA, clipping_error, larger_batch_of, roundoff, scaled_larger_batch

COARSE = (
    f"{LAMBDA:g} times what the larger batch loses in this precision and rounding the micro-batches' parts "
    "adds, the nearest of each kind of window, because a single rounding may switch a unit"
)


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
