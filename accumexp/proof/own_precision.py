"""Windows one after the other in the run's own precision: what fp64 cannot see of a loop that has buffers."""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict

import torch
from torch import Tensor

from ..accum.batch import batch_size
from .certificate import Check
from .gradients import DOUBLE, WHOLE, loss_scale_of, norms_of_errors, roundings
from .larger_batch import clipped, norm
from .observation import Observation
from .problem import Batch, Problem, Start, whole
from .ranks import all_gather, worst
from .replay import BITS, SHARDED, states
from .rounding import LAMBDA, clipping, in_precision, narrowed, rough_in_precision, roundoff

COARSE = (
    f"{LAMBDA:g} times what the larger batch loses in this precision and rounding the micro-batches' parts "
    "adds, the nearest of each kind of window, because a single rounding may switch a unit"
)


class OwnPrecisionReplay:
    """Follows a loop in its own precision, every update by itself, from the weights the loop had.

    Args:
        problem: what the loop should do.
        start: the loop's model and optimizer, as they are before the first update.

    Attributes:
        updates: how many were followed.
        diverged: the larger batch itself left the precision's range, and no more updates are followed.
    """

    def __init__(self, problem: Problem, start: Start) -> None:
        self.problem = problem
        self.start = start
        self.model = copy.deepcopy(problem.model).to(problem.dtype)
        self.optimizer = problem.optimizer(list(self.model.parameters()))
        self.schedule = problem.scheduler(self.optimizer) if problem.scheduler else None
        self.updates = 0
        self.diverged = False
        self._full = 0
        self._found: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
        self._stepped = 0
        self._bits: tuple[float, int, str] = (0.0, 0, "")

    def follow(self, batch: Batch, seen: Observation) -> None:
        """Compares the update that the loop has just made on the whole `batch`."""
        if self.diverged:
            return
        if self.problem.scaling is not None and not max(all_gather(seen.steps)):
            self._step_schedule()  # skipped: there is nothing to compare
            return
        self.updates += 1
        self._full = max(self._full, batch_size(batch))
        kind = "first" if self.updates == 1 else "following"
        kind = "smaller" if batch_size(batch) < self._full else kind
        self._stepped = max(self._stepped, abs(seen.steps - 1))
        if all(all_gather(seen.gradient is not None)):
            error, bound = self._distance(batch, seen)
            if not math.isfinite(bound):  # the larger batch itself has left this precision's range
                self.diverged = True
                self.updates -= 1
                return
            self._found[kind].append((error, bound, self.updates))
        self._step(seen)

    def _distance(self, batch: Batch, seen: Observation) -> tuple[float, float]:
        """(the window's error, its bound), of the whole gradient, relative to it."""
        problem = self.problem
        assert seen.gradient is not None
        exact = in_precision(problem, narrowed(self.model, DOUBLE), batch, DOUBLE).gradient
        scale = loss_scale_of(problem, seen, exact)
        rough = rough_in_precision(problem, self.model, batch, scale).gradient
        size, right = norm(exact) or 1.0, clipped(exact, problem.clip_norm)
        length = norm(right) or 1.0
        error = norms_of_errors(seen.gradient, right)[WHOLE] / length
        lost = norms_of_errors(rough, exact)[WHOLE] / size + roundings(problem, seen).get(WHOLE, 0.0) / length
        u = roundoff(problem.autocast or problem.dtype)
        bound = LAMBDA * (lost + u) + clipping(problem.clip_norm, exact, problem.dtype)
        return worst(all_gather(error)), max(all_gather(bound))

    def _step(self, seen: Observation) -> None:
        """Torch's optimizer on the gradient that the loop's was given."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                given = None if seen.gradient is None or name in seen.absent else seen.gradient.get(name)
                parameter.grad = given if given is None else given.to(parameter)
        if seen.gradient is not None:
            self.optimizer.step()
        self._step_schedule()
        loops = self.start.parameters()
        for name, parameter in self.model.named_parameters():
            self._compare(name, loops[name], parameter, seen)
        own, other = states(self.optimizer), states(self.start.optimizer)
        for key in own.keys() & other.keys():
            self._compare(f"optimizer {key}", other[key], own[key], seen)
        with torch.no_grad():
            theirs = dict(self.start.inner.named_buffers())
            for name, buffer in self.model.named_buffers():
                buffer.copy_(whole(theirs[name]))

    def _compare(self, name: str, found: Tensor, right: Tensor, seen: Observation) -> None:
        found = whole(found.detach())
        if torch.equal(found, right):
            return
        # A fused optimizer that unscales by itself rounds in another place.
        if not seen.divided:
            size = float(right.detach().double().norm()) or 1.0
            figure = float((found.double() - right.detach().double()).norm()) / size
            if not figure <= self._bits[0]:
                self._bits = (figure, self.updates, name)
        with torch.no_grad():
            right.copy_(found)

    def _step_schedule(self) -> None:
        if self.schedule is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # if skipped
                self.schedule.step()

    def checks(self, name: str) -> list[Check]:
        """What was found. All ranks must ask."""
        over = f"{self.updates} updates, {name}"
        if not self._found and self.diverged:
            return []
        if not self._found:
            return [Check(f"gradient, {over}", math.inf, 0.0, "relative", COARSE, "no update was made")]
        nearest = [(min(found, key=_ratio), kind) for kind, found in self._found.items()]
        (error, bound, update), kind = max(nearest, key=lambda item: _ratio(item[0]))
        figure, number, where = max(all_gather(self._bits))
        sharded = any(hasattr(p, "full_tensor") for p in self.start.parameters().values())
        limit = SHARDED * 2.0**53 * roundoff(self.problem.dtype) if sharded else 0.0
        at = f"update {update}, nearest of the {kind} windows"
        steps = float(max(all_gather(self._stepped)))
        return [
            Check(f"gradient, {over}", error, bound, "relative", COARSE, at),
            Check(
                f"optimizer, {over}",
                figure,
                limit,
                "relative",
                BITS,
                f"off in update {number} at {where}" if figure else "no difference",
            ),
            Check(
                f"number of updates, {name}",
                steps,
                0.0,
                "count",
                "one step of the optimizer a window",
                "no difference" if not steps else "too many in a window",
            ),
        ]


def _ratio(found: tuple[float, float, int]) -> float:
    error, bound, _ = found
    return math.inf if math.isnan(error) or not math.isfinite(bound) else error / bound
