"""The learning rates of a loop's updates, and why they are not the schedule's."""

from __future__ import annotations

import copy
import math
import warnings

from torch.optim import Optimizer

from .certificate import Cause
from .problem import Problem

# The largest number of schedule steps in an update that is considered as a cause.
MOST_STEPS = 64


class LearningRates:
    """The rates of every update, by parameter group: the loop's and the schedule's."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._pairs: list[tuple[list[float], list[float]]] = []
        self._passes: list[int] = []

    def compare(self, rates: list[float], optimizer: Optimizer, passes: int) -> float:
        """The largest relative error of the loop's `rates`; those of `optimizer` are right.

        Args:
            passes: forward passes of the window.
        """
        expected = [float(group["lr"]) for group in optimizer.param_groups]
        if rates:
            self._pairs.append((rates, expected))
            self._passes.append(passes)
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
        for steps in [0, *range(2, MOST_STEPS + 1)]:
            constant = [steps] * len(self._pairs)
            if any(self._follow(constant, before) for before in range(max(1, steps))):
                times = f"stepped {steps} times an update" if steps else "never stepped"
                advice = "step it once after the optimizer's step, on every rank once"
                return [_cause(f"the schedule is {times}", update, advice)]
        if any(self._follow(self._passes, before) for before in (0, self._passes[0] - 1, self._passes[0])):
            return [_cause("the schedule is stepped once a micro-batch", update, "step it once an update")]
        if ahead := self._extra_steps():
            return [ahead]
        for number, (rates, right) in enumerate(self._pairs, 1):
            for group, (rate, expected) in enumerate(zip(rates, right, strict=False)):
                if rate != expected:
                    of_group = f" of parameter group {group}" if groups > 1 else ""
                    figures = f"is {rate:.4g} in update {number}, the schedule's is {expected:.4g}"
                    reason = f"the learning rate{of_group} {figures}"
                    return [
                        Cause("schedule", "", reason, math.nan, "", "take the optimizer's own learning rate")
                    ]
        return []

    def _extra_steps(self) -> Cause | None:
        """The cause if the schedule is stepped otherwise than once before one of the updates."""
        if self.problem.scheduler is None:
            return None
        first = next((k for k, (rates, right) in enumerate(self._pairs) if rates != right), 0)
        optimizer = self.problem.optimizer(list(copy.deepcopy(self.problem.model).parameters()))
        schedule = self.problem.scheduler(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer is not stepped
            for made in range(first + MOST_STEPS):
                if [float(group["lr"]) for group in optimizer.param_groups] == self._pairs[first][0]:
                    steps = made - first + 1
                    reason = f"the schedule is stepped {steps} times between updates {first} and {first + 1}"
                    return (
                        Cause("schedule", "", reason, math.nan, "", "step it once an update")
                        if first
                        else None
                    )
                schedule.step()
        return None

    def _follow(self, steps: list[int], before: int) -> bool:
        """Whether the loop's rates are those of a schedule with so many `steps` in each update.

        Args:
            before: how many of the first update's steps come before the optimizer's; of a later update as
                many fewer or more as it has steps.
        """
        if self.problem.scheduler is None:
            return False
        optimizer = self.problem.optimizer(list(copy.deepcopy(self.problem.model).parameters()))
        schedule = self.problem.scheduler(optimizer)
        made = 0
        due = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer is not stepped
            for (rates, _), of_update in zip(self._pairs, steps, strict=True):
                for _ in range(due + max(0, before + of_update - steps[0]) - made):
                    schedule.step()
                    made += 1
                if abs(rates[0] - float(optimizer.param_groups[0]["lr"])) > 1e-12 * abs(rates[0]):
                    return False
                due += of_update
        return True


def _cause(reason: str, update: int, advice: str) -> Cause:
    shown = f"from update {update} on the loop's learning rates are exactly those"
    return Cause("schedule", "", reason, math.nan, shown, advice)
