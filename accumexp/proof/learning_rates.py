"""The learning rates of a loop's updates, and why they are not the schedule's."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from itertools import pairwise

from torch.optim import Optimizer

from .certificate import Cause
from .evidence import all_updates_in_words
from .problem import Problem

# The largest number of schedule steps in an update that is considered as a cause.
MOST_STEPS = 64
TAKE_OWN = "take the optimizer's own learning rate"


class LearningRates:
    """The rates of every update, by parameter group: the loop's and the schedule's."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._pairs: list[tuple[list[float], list[float]]] = []
        self._passes: list[int] = []
        self._numbers: list[int] = []  # of the updates with a step
        self._updates = 0

    def compare(self, rates: list[float], optimizer: Optimizer, passes: int) -> float:
        """The largest relative error of the loop's `rates`; those of `optimizer` are right.

        Args:
            passes: forward passes of the window.
        """
        self._updates += 1
        expected = [float(group["lr"]) for group in optimizer.param_groups]
        if rates:
            self._pairs.append((rates, expected))
            self._passes.append(passes)
            self._numbers.append(self._updates)
        pairs = zip(rates or expected, expected, strict=False)
        return max(abs(rate - right) / (abs(right) or 1.0) for rate, right in pairs)

    def causes(self, windows: Mapping[int, str]) -> list[Cause]:
        """Why the rates are wrong: a constant factor, or too many or too few schedule steps.

        Args:
            windows: descriptions of the smaller windows, by update.
        """
        if not self._pairs:
            return []
        groups = len(self._pairs[0][1])
        ratios = [self._ratio(group) for group in range(groups)]
        if factor := next((ratio for ratio in ratios if ratio not in (None, 1.0)), None):
            # The replay has the schedule's rates, which are the optimizer's own without one.
            of_group = _of_groups([k for k, ratio in enumerate(ratios) if ratio == factor], groups)
            reason = f"the learning rate{of_group} is {factor:.4g} times the schedule's"
            return [_cause(reason, TAKE_OWN)]
        for steps in [0, *range(2, MOST_STEPS + 1)]:
            constant = [steps] * len(self._pairs)
            if any(self._follow(constant, before) for before in range(max(1, steps))):
                times = f"stepped {steps} times an update" if steps else "never stepped"
                advice = "step it once after the optimizer's step, on every rank once"
                return [_cause(f"the schedule is {times}", advice)]
        if any(self._follow(self._passes, before) for before in (0, self._passes[0] - 1, self._passes[0])):
            return [_cause("the schedule is stepped once a micro-batch", "step it once an update")]
        reason = self._extra_steps(windows)
        if reason:
            return [_cause(reason, "step it once an update")]
        reason = self._wrong_figures(windows)
        return [Cause("schedule", "", reason, math.nan, "", TAKE_OWN)] if reason else []

    def _ratio(self, group: int) -> float | None:
        """The factor by which all rates of a `group` are wrong; None if there is none."""
        pairs = [(rates[group], right[group]) for rates, right in self._pairs if len(rates) > group]
        ratios = [rate / right for rate, right in pairs if right]
        same = ratios and max(ratios) - min(ratios) <= 1e-9 * abs(ratios[0])
        return round(ratios[0], 9) if same else None

    def _wrong_figures(self, windows: Mapping[int, str]) -> str:
        """In which updates the rates of the first wrong group are wrong, and by how much; "" if in none."""
        groups = len(self._pairs[0][1])
        whose = "the schedule's" if self.problem.scheduler is not None else "the optimizer's own"
        for group in range(groups):
            pairs = [
                (number, rates[group], right[group])
                for number, (rates, right) in zip(self._numbers, self._pairs, strict=True)
                if len(rates) > group
            ]
            wrong = [(number, rate, right) for number, rate, right in pairs if rate != right]
            if not wrong:
                continue
            number, rate, right = wrong[0]
            when = all_updates_in_words([n for n, *_ in wrong], [n for n, *_ in pairs], windows)
            rates = f"{rate:.4g} where {whose} is {right:.4g}"
            subject = f"the learning rate{_of_groups([group], groups)} is"
            factors = [one / other for _, one, other in wrong if other]
            if factors and max(factors) - min(factors) <= 1e-9 * abs(factors[0]):
                first = f" in update {number}" if len(wrong) > 1 and whose == "the schedule's" else ""
                return f"{subject} {factors[0]:.4g} times {whose}, {when}: {rates}{first}"
            first = f" in update {number}" if len(wrong) > 1 else ""
            return f"{subject} wrong, {when}: {rates}{first}"
        return ""

    def _extra_steps(self, windows: Mapping[int, str]) -> str:
        """After which updates the schedule is stepped otherwise than once; "" if that is not known."""
        rates = self._schedule(len(self._pairs) + MOST_STEPS)
        made, steps = 0, []
        if not rates or self._pairs[0][0] != rates[0] or len(self._pairs) < self._updates:
            return ""
        for ours, _ in self._pairs[1:]:
            following = next(
                (n for n in range(made, min(len(rates), made + MOST_STEPS)) if rates[n] == ours), None
            )
            if following is None:
                return ""
            steps.append(following - made)
            made = following
        if any(one == other for one, other in pairwise(rates[: made + 1])):
            return ""  # equal rates do not tell how often the schedule is stepped
        wrong = [number for number, count in enumerate(steps, 1) if count != 1]
        if not wrong:
            return ""
        counts = sorted({steps[number - 1] for number in wrong})
        times = f"{counts[0]} times" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} times"
        times = "not stepped" if counts == [0] else f"stepped {times}"
        when = all_updates_in_words(wrong, range(1, len(self._pairs)), windows)
        after = f"after {when[3:]}" if when.startswith("in ") else f"an update, {when}"
        return f"the schedule is {times} {after}"

    def _schedule(self, length: int) -> list[list[float]]:
        """The rates of all groups before each of `length` steps of the schedule; none without one."""
        if self.problem.scheduler is None:
            return []
        optimizer = self.problem.optimizer(list(copy.deepcopy(self.problem.model).parameters()))
        schedule = self.problem.scheduler(optimizer)
        rates = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the optimizer is not stepped
            for _ in range(length):
                rates.append([float(group["lr"]) for group in optimizer.param_groups])
                try:
                    schedule.step()
                except ValueError:  # OneCycleLR has no more steps
                    break
        return rates

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


def _of_groups(numbers: list[int], groups: int) -> str:
    """Which of so many parameter `groups` these are, in words; "" for all."""
    if len(numbers) == groups:
        return ""
    return f" of parameter group{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _cause(reason: str, advice: str) -> Cause:
    return Cause("schedule", "", reason, math.nan, "the loop's learning rates are exactly those", advice)
