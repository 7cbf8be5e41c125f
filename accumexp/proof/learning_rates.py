"""The learning rates of a loop compared with its schedule's, and why they differ."""

from __future__ import annotations

import copy
import math
import warnings

from torch.optim import Optimizer

from .certificate import Cause
from .problem import Problem

# The largest number of schedule steps in an update that is tried as an explanation.
MOST_STEPS = 64


class LearningRates:
    """The rates of every update, by parameter group: the loop's and the schedule's."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._pairs: list[tuple[list[float], list[float]]] = []

    def compare(self, rates: list[float], optimizer: Optimizer) -> float:
        """The largest relative error of the loop's `rates`; those of `optimizer` are right."""
        expected = [float(group["lr"]) for group in optimizer.param_groups]
        if rates:
            self._pairs.append((rates, expected))
        pairs = zip(rates or expected, expected, strict=False)
        return max(abs(rate - right) / (abs(right) or 1.0) for rate, right in pairs)

    def causes(self, update: int) -> list[Cause]:
        """Why the rates are wrong, most of all in `update`: a constant factor, or too many schedule steps."""
        groups = len(self._pairs[0][1]) if self._pairs else 0
        for group in range(groups):
            pairs = [(rates[group], right[group]) for rates, right in self._pairs if len(rates) == groups]
            ratios = [rate / right for rate, right in pairs if right]
            if ratios and ratios[0] != 1 and max(ratios) - min(ratios) <= 1e-9 * abs(ratios[0]):
                of_group = f" of parameter group {group}" if groups > 1 else ""
                reason = f"the learning rate{of_group} is {ratios[0]:.4g} times the schedule's"
                return [_cause(reason, update, "take the optimizer's own learning rate")]
        for steps in range(2, MOST_STEPS + 1):
            if self._follow(steps):
                reason = f"the schedule is stepped {steps} times an update"
                advice = "step it once after the optimizer's step, on every rank once"
                return [_cause(reason, update, advice)]
        return []

    def _follow(self, steps: int) -> bool:
        """Whether the loop's rates are those of a schedule that is stepped `steps` times an update."""
        if self.problem.scheduler is None:
            return False
        optimizer = self.problem.optimizer(list(copy.deepcopy(self.problem.model).parameters()))
        schedule = self.problem.scheduler(optimizer)
        for rates, _ in self._pairs:
            if abs(rates[0] - float(optimizer.param_groups[0]["lr"])) > 1e-12 * abs(rates[0]):
                return False
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the optimizer is not stepped
                for _ in range(steps):
                    schedule.step()
        return True


def _cause(reason: str, update: int, advice: str) -> Cause:
    shown = f"from update {update} on the loop's learning rates are exactly those"
    return Cause("schedule", "", reason, math.nan, shown, advice)
