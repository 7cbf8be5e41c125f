"""Update after update: the larger batch's own optimizer and schedule beside the loop's.

Every update is compared by itself, from the weights the loop had before it, so rounding does not grow:
equal updates from equal weights make equal trainings. What the optimizer makes of a gradient is compared
on the gradient that the loop gave it, and there not a bit may differ.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .bounds import U32, Expected, expected
from .certificate import Check
from .everyone import everyone, worst
from .gradients import DOUBLE, Compared, check_of, compare
from .larger import norm
from .problem import Batch, Ids, Problem, Start, cast, whole
from .watch import Seen
from .wide import computing

BITS = "the same arithmetic on the same gradient: not a bit may differ"
# Of parameters that are spread over ranks other kernels run on shards than on the whole.
SHARDED = 8 * 2.0**-53


class Course:
    """Follows a loop in fp64 and collects the worst of every comparison.

    Args:
        problem: what the loop should do.
        start: the loop's model, optimizer and schedule, as they are before the first update.
    """

    def __init__(self, problem: Problem, start: Start) -> None:
        self.problem = problem
        self.start = start
        self.model = copy.deepcopy(problem.model).to(DOUBLE)
        self.optimizer = problem.optimizer(list(self.model.parameters()))
        self.schedule = problem.scheduler(self.optimizer) if problem.scheduler else None
        self.updates = 0
        self.acted = 0
        self.first_wrong = 0
        self.diverged = False
        self._gradient: tuple[int, Compared] = (0, Compared(0.0, 0.0, "", 0.0, 0.0))
        self._loss: tuple[int, float, float] = (0, 0.0, 1.0)
        self._logged = False
        self._worst: dict[str, tuple[int, float]] = {}
        self._scales: list[float] = []

    def follow(self, batch: Batch, seen: Seen, loss: float | None) -> None:
        """Compares the update that the loop has just made on the whole `batch` with the larger batch's."""
        if self.diverged:
            return
        right = expected(self.problem, cast(batch, DOUBLE), self.model, self.problem.clip_norm)
        figures = [right.size, right.loss, right.loss_bound, *right.bound.values()]
        if not all(everyone(all(map(math.isfinite, figures)))):
            # From here on the larger batch itself is beyond fp32's range.
            self.diverged = True
            return
        self.updates += 1
        self.acted += self.problem.clip_norm is not None and right.size > self.problem.clip_norm
        found = compare(seen.gradient, right)
        if not found.equal and not self.first_wrong:
            self.first_wrong = self.updates
        if not found.ratio <= self._gradient[1].ratio and not math.isnan(self._gradient[1].ratio):
            self._gradient = (self.updates, found)
        if loss is not None:
            self._logged = True
            error = abs(loss - right.loss)
            # Logs are kept in fp32, added up and rounded once more.
            bound = right.loss_bound + (len(seen.sizes) + 1) * U32 * abs(right.loss)
            if not error * self._loss[2] <= self._loss[1] * bound:
                self._loss = (self.updates, error, bound)
        self._samples(batch, seen)
        self._keep("number of updates", abs(seen.steps - 1))
        self._rates(seen)
        self._scale(seen, right)
        self._step(seen)

    def _samples(self, batch: Batch, seen: Seen) -> None:
        from ..accum.batch import batch_size

        size = batch_size(batch)
        every = everyone((seen.micro_batches, seen.sizes))
        if all(micro is not None for found, _ in every for micro in found):
            # Ranks cannot tell equal samples apart, so those are counted together.
            alike = Ids.of(batch[0]).alike()
            ids = Counter(alike[number] for found, _ in every for micro in found for number in micro or ())
            # A rank without samples of its own sees one as padding, so none may be lost, and none doubled
            # is told by the gradient.
            self._keep("samples", (Counter(alike.values()) - ids).total())
        else:
            self._keep("samples", abs(size - sum(sum(sizes) for _, sizes in every)))

    def _rates(self, seen: Seen) -> None:
        right = [float(group["lr"]) for group in self.optimizer.param_groups]
        pairs = zip(seen.rates or right, right, strict=False)
        self._keep("learning rate", max(_relative(found, rate) for found, rate in pairs))

    def _scale(self, seen: Seen, right: Expected) -> None:
        if self.problem.scaling is None or not any(everyone(bool(seen.arrived))):
            return
        exact = right.larger.gradient
        top = sum(float((seen.arrived[name] * g).sum()) for name, g in exact.items() if name in seen.arrived)
        self._scales.append(sum(everyone(top)) / (norm(exact) ** 2 or 1.0))

    def _step(self, seen: Seen) -> None:
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
        number, found = self._gradient
        after = ", after which the larger batch itself diverges" if self.diverged else ""
        clip = f", clipped in {self.acted}" if self.problem.clip_norm is not None else ""
        checks = [
            check_of(f"gradient, {over}", found, (f"update {number}" if number else over) + clip + after)
        ]
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
            every = everyone((error, bound, number))
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

    def _bits(self, title: str, name: str, bound: float, why: str = BITS, unit: str = "relative") -> Check:
        found = everyone(self._worst.get(name, (0, 0.0)))
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
        ratios = [scale / self._scales[0] for scale in self._scales]
        off = [
            abs(math.log(max(ratio, 1e-300)) - (number // scaling.growth_interval) * math.log(grows))
            for number, ratio in enumerate(ratios)
        ]
        figure = max(off)
        return [
            Check(
                "loss scale by update",
                figure,
                0.01,
                "log ratio",
                f"it grows {grows:g}-fold after {scaling.growth_interval} windows without an overflow",
                f"{ratios[off.index(figure)]:g} times the first in update {off.index(figure) + 1}"
                if figure > 0.01
                else f"{ratios[-1]:g} times the first at the end",
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
