"""Update after update: the larger batch's own optimizer and schedule beside the loop's.

Every update is compared by itself, from the weights the loop had before it, so rounding does not grow:
equal updates from equal weights make equal trainings. What the optimizer makes of a gradient is compared
on the gradient that the loop gave it, and there not a bit may differ.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from ..accum.batch import batch_size
from .certificate import Cause, Check
from .float64 import computing
from .gradients import DOUBLE, Compared, check_of, compare
from .larger_batch import norm
from .observation import Observation
from .problem import Batch, Ids, Problem, Start, cast, whole
from .ranks import all_gather, worst
from .rounding import U32, Expected, expected

BITS = "the same arithmetic on the same gradient: not a bit may differ"
# Of a model with more than LARGE parameters the larger batch is computed in the first updates, in every
# window that is smaller than usual, and then seldom; its optimizer and schedule are followed in all.
LARGE = 2_000_000
CLOSELY = 10
SELDOM = 10
# Of parameters that are spread over ranks other kernels run on shards than on the whole.
SHARDED = 8 * 2.0**-53


class Replay:
    """Follows a loop in fp64 and collects the worst of every comparison.

    Args:
        problem: what the loop should do.
        start: the loop's model, optimizer and schedule, as they are before the first update.

    Attributes:
        updates: how many were followed.
        diverged: the larger batch itself left fp32's range, and no more updates are followed.
        losses: the larger batch's loss, and the bound of its error, by update.
    """

    def __init__(self, problem: Problem, start: Start) -> None:
        self.problem = problem
        self.start = start
        self.model = copy.deepcopy(problem.model).to(DOUBLE)
        self.optimizer = problem.optimizer(list(self.model.parameters()))
        self.schedule = problem.scheduler(self.optimizer) if problem.scheduler else None
        self.updates = 0
        self.acted = 0
        self.diverged = False
        self._gradient: tuple[int, Compared] = (0, Compared(0.0, 0.0, "", 0.0, 0.0))
        self._loss: tuple[int, float, float] = (0, 0.0, 1.0)
        self._logged = False
        self.losses: dict[int, tuple[float, float]] = {}
        self._worst: dict[str, tuple[int, float]] = {}
        self._scales: list[tuple[int, float]] = []
        self._full = 0
        numbers = sum(p.numel() for p in self.model.parameters())
        self._every = 1 if numbers <= LARGE else SELDOM
        self._followed: list[tuple[list[float], list[float]]] = []  # learning rates: the loop's, the right

    def follow(self, batch: Batch, seen: Observation) -> None:
        """Compares the update that the loop has just made on the whole `batch` with the larger batch's."""
        if self.diverged:
            return
        size = batch_size(batch)
        self._full = max(self._full, size)
        number = self.updates + 1
        if number <= CLOSELY or number % self._every == 0 or size < self._full:
            self._gradients(number, batch, seen)
            if self.diverged:
                return
        self.updates = number
        self._samples(batch, seen)
        self._keep("number of updates", abs(seen.steps - 1))
        self._rates(seen)
        self._step(seen)

    def _gradients(self, number: int, batch: Batch, seen: Observation) -> None:
        right = expected(self.problem, cast(batch, DOUBLE), self.model, self.problem.clip_norm)
        figures = [right.size, right.loss, right.loss_bound, *right.bound.values()]
        if not all(all_gather(all(map(math.isfinite, figures)))):
            # From here on the larger batch itself is beyond fp32's range.
            self.diverged = True
            return
        self.acted += self.problem.clip_norm is not None and right.size > self.problem.clip_norm
        found = compare(seen.gradient, right)
        if not found.ratio <= self._gradient[1].ratio and not math.isnan(self._gradient[1].ratio):
            self._gradient = (number, found)
        # Logs are kept in fp32, added up and rounded once more.
        logged = (len(seen.sizes) + 1) * U32 * abs(right.loss)
        self.losses[number] = (right.loss, right.loss_bound + logged)
        self._scale(number, seen, right)

    def logged(self, update: int, loss: float) -> None:
        """Compares what the loop logged as the loss of `update`, if its gradient was compared."""
        if update not in self.losses:
            return
        self._logged = True
        right, bound = self.losses[update]
        error = abs(loss - right)
        if not error * self._loss[2] <= self._loss[1] * bound:
            self._loss = (update, error, bound)

    def _samples(self, batch: Batch, seen: Observation) -> None:
        size = batch_size(batch)
        every = all_gather((seen.micro_batches, seen.sizes))
        if all(micro is not None for found, _ in every for micro in found):
            # Ranks cannot tell equal samples apart, so those are counted together.
            alike = Ids.of(batch[0]).alike()
            ids = Counter(alike[number] for found, _ in every for micro in found for number in micro or ())
            # A rank without samples of its own sees one as padding, so none may be lost, and none doubled
            # is told by the gradient.
            self._keep("samples", (Counter(alike.values()) - ids).total())
        else:
            self._keep("samples", abs(size - sum(sum(sizes) for _, sizes in every)))

    def _rates(self, seen: Observation) -> None:
        right = [float(group["lr"]) for group in self.optimizer.param_groups]
        if seen.rates:
            self._followed.append((seen.rates, right))
        pairs = zip(seen.rates or right, right, strict=False)
        self._keep("learning rate", max(_relative(found, rate) for found, rate in pairs))

    def _scale(self, number: int, seen: Observation, right: Expected) -> None:
        if self.problem.scaling is None or not any(all_gather(bool(seen.arrived))):
            return
        exact = right.larger.gradient
        if not right.size:
            return  # times nothing every scale is nothing
        top = sum(float((seen.arrived[name] * g).sum()) for name, g in exact.items() if name in seen.arrived)
        self._scales.append((number, sum(all_gather(top)) / (norm(exact) ** 2 or 1.0)))

    def _step(self, seen: Observation) -> None:
        """The larger batch's optimizer on the gradient that the loop's was given."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                given = None if seen.gradient is None or name in seen.absent else seen.gradient.get(name)
                parameter.grad = given if given is None else given.to(parameter)
        if seen.gradient is not None:
            with computing(DOUBLE):  # torch's optimizers count steps in the default dtype
                self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
        loops = self.start.parameters()
        mine = dict(self.model.named_parameters())
        self._keep("parameters", max(_difference(loops[name], p) for name, p in mine.items()))
        own, other = (states(o) for o in (self.optimizer, self.start.optimizer))
        same = own.keys() == other.keys()
        self._keep(
            "optimizer state",
            max((_difference(other[key], value) for key, value in own.items()), default=0.0)
            if same
            else math.inf,
        )
        self._go_on_from(loops)

    def _go_on_from(self, loops: dict[str, nn.Parameter]) -> None:
        """Takes over the loop's weights, state and buffers, so that an error is counted once."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(whole(loops[name]))
            buffers = dict(self.start.inner.named_buffers())
            for name, buffer in self.model.named_buffers():
                buffer.copy_(whole(buffers[name]))
        if self._worst["optimizer state"][1] and self._worst["optimizer state"][0] == self.updates:
            wanted = states(self.start.optimizer)
            for key, value in states(self.optimizer).items():
                if key in wanted:
                    value.copy_(whole(wanted[key]).to(value))

    def _keep(self, name: str, figure: float) -> None:
        if name not in self._worst or not figure <= self._worst[name][1]:
            self._worst[name] = (self.updates, figure)

    def checks(self) -> list[Check]:
        """What was found, over all updates that were followed. All ranks must ask."""
        over = f"{self.updates} updates"
        some = f", {len(self.losses)} of them compared" if len(self.losses) < self.updates else ""
        number, found = self._gradient
        after = ", after which the larger batch itself diverges" if self.diverged else ""
        clip = f", clipped in {self.acted}" if self.problem.clip_norm is not None else ""
        detail = f"update {number}" if number else over
        checks = [check_of(f"gradient, {over}", found, detail + some + clip + after)]
        sharded = any(hasattr(p, "full_tensor") for p in self.start.parameters().values())
        for name in ("parameters", "optimizer state"):
            checks.append(self._bits(f"{name}, {over}", name, SHARDED if sharded else 0.0))
        checks.append(
            self._bits(
                f"learning rate, {over}", "learning rate", 0.0, "the schedule is stepped once an update"
            )
        )
        if self._logged:
            number, error, bound = self._loss
            every = all_gather((error, bound, number))
            error, bound, number = max(every, key=lambda item: item[0] / item[1] if item[1] else item[0])
            checks.append(
                Check(
                    f"logged loss, {over}",
                    error,
                    bound if number else 0.0,
                    "loss",
                    "fp64 rounding of the larger batch's mean loss, and of one that is added up in fp32: "
                    "(N+1) u of it",
                    f"worst at update {number}" if number else "no difference",
                )
            )
        for name, why in (
            ("number of updates", "one step of the optimizer a window"),
            ("samples", "every sample of the batch is seen in its window"),
        ):
            checks.append(self._bits(name, name, 0.0, why, "count"))
        checks.extend(self._scale_check())
        return checks

    def causes(self) -> list[Cause]:
        """Why learning rates are wrong: by a factor, or a schedule that runs too fast."""
        if not self._worst.get("learning rate", (0, 0.0))[1]:
            return []
        groups = len(self._followed[0][1]) if self._followed else 0
        for group in range(groups):
            pairs = [(found[group], right[group]) for found, right in self._followed if len(found) == groups]
            ratios = [found / right for found, right in pairs if right]
            if ratios and ratios[0] != 1 and max(ratios) - min(ratios) <= 1e-9 * abs(ratios[0]):
                of = f" of parameter group {group}" if groups > 1 else ""
                reason = f"the learning rate{of} is {ratios[0]:.4g} times the schedule's"
                return [self._of_schedule(reason, "take the optimizer's own learning rate")]
        for times in range(2, 65):
            if self._runs(times):
                reason = f"the schedule is stepped {times} times an update"
                return [
                    self._of_schedule(reason, "step it once after the optimizer's step, on every rank once")
                ]
        return []

    def _runs(self, times: int) -> bool:
        """Whether the loop's learning rates are those of a schedule stepped `times` an update."""
        if self.problem.scheduler is None:
            return False
        optimizer = self.problem.optimizer(list(copy.deepcopy(self.model).parameters()))
        schedule = self.problem.scheduler(optimizer)
        for found, _ in self._followed:
            if abs(found[0] - float(optimizer.param_groups[0]["lr"])) > 1e-12 * abs(found[0]):
                return False
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no optimizer was stepped before it
                for _ in range(times):
                    schedule.step()
        return True

    def _of_schedule(self, reason: str, advice: str) -> Cause:
        update, _ = self._worst["learning rate"]
        shown = f"from update {update} on the loop's learning rates are exactly those"
        return Cause("schedule", "", reason, math.nan, shown, advice)

    def _bits(self, title: str, name: str, bound: float, why: str = BITS, unit: str = "relative") -> Check:
        found = all_gather(self._worst.get(name, (0, 0.0)))
        figure = worst([figure for _, figure in found])
        number = next((n for n, value in found if value == figure or math.isnan(value)), 0)
        detail = f"off in update {number}" if figure else "no difference"
        if name == "samples" and figure:
            detail = f"missed or too many in update {number}"
        return Check(title, figure, bound, unit, why, detail)

    def _scale_check(self) -> list[Check]:
        scaling = self.problem.scaling
        if scaling is None or not self._scales:
            return []
        grows = scaling.growth_factor
        ratios = [scale / self._scales[0][1] for _, scale in self._scales]
        grown = [(update - 1) // scaling.growth_interval for update, _ in self._scales]
        off = [
            abs(math.log(max(ratio, 1e-300)) - times * math.log(grows))
            for times, ratio in zip(grown, ratios, strict=True)
        ]
        figure = max(off)
        worst_one = off.index(figure) if figure > 0.01 else len(off) - 1
        return [
            Check(
                "loss scale by update",
                figure,
                0.01,
                "log ratio",
                f"it grows {grows:g}-fold after {scaling.growth_interval} windows without an overflow",
                f"{ratios[worst_one]:g} times the first in update {self._scales[worst_one][0]}",
            )
        ]


def states(optimizer: Any) -> dict[tuple[Any, str], Tensor]:
    """The tensors of an optimizer's state, by parameter number and name."""
    state = optimizer.state_dict()["state"]
    return {
        (number, name): value
        for number, entries in state.items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def _difference(found: Tensor, right: Tensor) -> float:
    """The 2-norm of the difference, relative to `right`'s."""
    found = whole(found.detach())
    if found.shape != right.shape:
        return math.inf
    if torch.equal(found, right):
        return 0.0
    size = float(right.detach().double().norm())
    return float((found.double() - right.detach().double()).norm()) / (size or 1.0)


def _relative(found: float, right: float) -> float:
    return abs(found - right) / (abs(right) or 1.0)
