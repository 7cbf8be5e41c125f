"""The proof from its start to its certificate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from .arguments import batches_of, check_model, check_schedule
from .certificate import Cause, Certificate, Check
from .diagnosis import carried, diagnose, never_clipped, of_buffers, of_precision
from .environment import environment, precision_name
from .gradients import DOUBLE, TRIES, gradient_check, precision_checks
from .observation import observe
from .overflow import overflow_checks
from .own_precision import OwnPrecisionReplay
from .problem import Batch, Problem, Scaling, Start, TrainWindow, cast
from .randomness import drawing_modules, unheld, why_draws
from .ranks import all_gather, ranks
from .replay import Replay
from .rounding import in_precision, narrowed
from .windows import (
    activations_check,
    agreement_check,
    buffers_check,
    collectives_check,
    ragged,
    resume_check,
    weighted,
)

Stage = Callable[[str], None]
# Updates in the run's own precision: four whole and three smaller windows.
FOLLOWED = 7


def certify(
    train_window: TrainWindow,
    model: nn.Module,
    loss: Callable[..., Any],
    batch: Batch | Sequence[Batch],
    steps: int,
    *,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    scheduler: Callable[[Optimizer], Any] | None = None,
    clip_norm: float | None = None,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
    precision: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    loss_scale: Scaling | None = None,
    updates: int = 100,
    seed: int = 0,
    progress: Stage | None = None,
) -> Certificate:
    """Is what `train_window` does one update of the larger batch?

    The loop is run on copies of `model`, in fp64 and in its own precision, and watched through hooks; what
    it should have done is computed beside it on the whole batch in one piece. Under torch.distributed all
    ranks call alike, each with the whole batch, of which their loop takes its share.

    Args:
        train_window: called as `train_window(model, optimizer, batch, steps)`, with the schedule as a
            fifth argument where there is one. Makes one update of `model` on `batch`, (inputs, targets) of
            all its samples, in `steps` micro-batches (fewer where the batch has fewer samples than usual:
            the last window of an epoch), clips, steps, zeroes. May return the loss that it would log.
        model: in the mode it is trained in. Stays as it is.
        loss: the larger batch's: a function of (outputs, targets) to a mean, of shape (); or an object with
            `weight(targets)` and `total(outputs, targets)`, whose quotient is the mean. If it has numbers of
            its own (class weights), the loop's criterion should be this very object: it is moved to fp64
            and back with the model.
        batch: of one update, (inputs, targets), samples first; or a list of several such pairs, of which
            the first is whole. Where inputs and targets are both pairs, one batch is given in a list.
        steps: micro-batches in a full window, on each rank.
        optimizer: makes the loop's optimizer from parameters; SGD with momentum if left out.
        scheduler: makes the schedule from an optimizer; the loop steps it once an update.
        clip_norm: the 2-norm that the loop clips the update's gradient to.
        prepare: what a copy of the model is put into before its optimizer is made (DistributedDataParallel,
            fully_shard); its result is the loop's `model`.
        precision: dtype of the parameters in the loop's own precision.
        autocast: dtype of its `torch.autocast`, which the loop itself enters.
        loss_scale: the settings of its loss scale, if it has a dynamic one.
        updates: that are followed one after the other, at least 1.
        seed: of torch's draws in every window.
        progress: told each stage when it begins.

    Raises:
        ValueError: for a batch that cannot be split into `steps`, a larger batch without a finite gradient,
            no updates, a model without trainable parameters or with lazy ones, a schedule whose `step()`
            needs arguments.
    """
    if updates < 1:
        raise ValueError(f"updates={updates}: without an update that is followed there is nothing to certify")
    batches = batches_of(batch)
    check_model(model)
    optimizer = optimizer or _momentum
    problem = Problem(
        train_window,
        model,
        loss,
        batches,
        steps,
        optimizer,
        scheduler,
        clip_norm,
        prepare,
        precision,
        autocast,
        loss_scale,
        seed,
    )
    if steps < 1 or problem.samples < steps * ranks():
        raise ValueError(f"steps={steps}: a batch of {problem.samples} samples cannot be split into them")
    with undisturbed(problem):
        check_schedule(model, optimizer, scheduler)
    return Proof(problem, progress or _silent).certificate(updates)


class Proof:
    """The checks of one problem, and where they fail the search for the cause.

    Attributes:
        checks, causes: what was found so far.
        reductions: how often the ranks' gradients may be reduced in a window.
        problem: with its random draws held fixed, once they were found.
    """

    def __init__(self, problem: Problem, progress: Stage, reductions: int = 1) -> None:
        self.problem = problem
        self.reductions = reductions
        self.progress = progress
        self.checks: list[Check] = []
        self.causes: list[Cause] = []

    def certificate(self, updates: int) -> Certificate:
        with undisturbed(self.problem):
            self.draws()
            self.windows()
            self.progress(f"{updates} updates, one by one")
            self.course(updates)
            self.progress("a stop between two windows")
            self.checks.append(resume_check(self.problem, [self.batch(0), self.batch(1)]))
            self.diagnosis()
        return self.result()

    def batch(self, number: int) -> Batch:
        return self.problem.batches[number % len(self.problem.batches)]

    def add(self, *checks: Check | None) -> None:
        self.checks.extend(check for check in checks if check is not None)

    def draws(self) -> None:
        """Finds what the model draws, and holds it fixed from here on."""
        self.progress("what the model draws")
        model = narrowed(self.problem.model, DOUBLE)
        exact = in_precision(self.problem, model, cast(self.batch(0), DOUBLE), DOUBLE)
        finite = all(bool(g.isfinite().all()) for g in exact.gradient.values())
        if not all(all_gather(finite)):
            raise ValueError("the larger batch's own gradient is not finite: there is nothing to be equal to")
        drawn, unknown, dims = drawing_modules(self.problem, self.batch(0))
        if drawn:
            self.problem, causes = why_draws(self.problem, self.batch(0), drawn, dims)
            self.causes.extend(causes)
        if unknown:
            self.causes.append(unheld(drawn, unknown))

    def windows(self, alone: bool = True) -> None:
        """The checks of single windows, and if `alone` of some in a row in the run's own precision."""
        problem, batch = self.problem, self.batch(0)
        self.progress("the gradient of every parameter, fp64")
        start = Start(problem, DOUBLE)
        check, seen, right = gradient_check("gradient, fp64", problem, batch, start=start)
        self.add(check)
        self.progress("ragged and weighted windows")
        parts = [
            gradient_check("gradient, ragged last window", problem, part, detail)[0]
            for detail, part in ragged(problem, batch)
        ]
        if parts:
            self.add(max(parts, key=_severity))
        uneven = weighted(problem, batch)
        if uneven is not None:
            self.add(gradient_check("gradient, weighted items", problem, uneven, "with ignored targets")[0])
        self.add(buffers_check(problem, start, right.larger.buffers))
        name = precision_name(problem)
        if problem.dtype is not DOUBLE:
            self.progress(f"the gradient in {name}")
            self.add(*precision_checks(problem, name))
            if alone:
                self.progress(f"windows one after the other in {name}")
                self.add(*self.following(name))
        self.progress("memory, ranks and overflow")
        self.add(activations_check(problem, batch))
        self.add(agreement_check(seen), collectives_check(problem, batch, self.reductions))
        self.add(*overflow_checks(problem, batch))
        self.first = seen

    def following(self, name: str) -> list[Check]:
        """Some updates in the run's own precision, smaller ones among them."""
        problem = self.problem
        start = Start(problem, problem.dtype)
        following = OwnPrecisionReplay(problem, start)
        parts = [part for _, part in ragged(problem, self.batch(0))]
        tries = TRIES if problem.scaling is not None else 0
        for number in range(FOLLOWED):
            batch = parts[number // 2 % len(parts)] if parts and number % 2 else self.batch(number)
            given = cast(batch, problem.dtype)
            seen = observe(start, given, arrivals=True)
            while tries and not max(all_gather(seen.steps)):
                following.follow(given, seen)
                seen, tries = observe(start, given, arrivals=True), tries - 1
            following.follow(given, seen)
        return following.checks(name)

    def course(self, updates: int) -> None:
        """Update after update from one start, with a smaller window now and then."""
        problem = self.problem
        start = Start(problem, DOUBLE)
        course = Replay(problem, start)
        parts = [part for _, part in ragged(problem, self.batch(0))]
        for number in range(updates):
            batch = self.batch(number)
            if parts and number % 3 == 2:
                batch = parts[number // 3 % len(parts)]
            batch = cast(batch, DOUBLE)
            seen = observe(start, batch, arrivals=problem.scaling is not None)
            course.follow(batch, seen)
            if seen.loss is not None and not course.diverged:
                course.logged(course.updates, seen.loss)
        self.checks.extend(course.checks())
        self.causes.extend(course.causes())
        if problem.clip_norm is not None and not course.acted:
            self.causes.append(never_clipped(problem.clip_norm))

    def diagnosis(self) -> None:
        """Finds the causes of what failed; the checks stand even where the search itself fails."""
        failed = [check for check in self.checks if not check.passed]
        if not failed:
            return
        self.progress("why")
        try:
            self._search(failed)
        except Exception as error:
            text = f"the search for the cause failed: {type(error).__name__}: {' '.join(str(error).split())}"
            advice = "the checks that failed stand without it"
            self.causes.append(Cause("unknown", "", text, math.nan, "", advice))

    def _search(self, failed: list[Check]) -> None:
        problem, batch = self.problem, self.batch(0)
        uneven = weighted(problem, batch)
        others = [part for _, part in ragged(problem, batch)]
        others += [uneven] if uneven is not None else []
        causes = diagnose(problem, failed, batch, others)
        if not causes and any(check.name.startswith("gradient") for check in failed):
            causes = carried(problem, [batch, self.batch(1)])
        self.causes.extend(causes)
        buffers = next((check for check in failed if check.name == "buffers"), None)
        if buffers is not None:
            self.causes.append(of_buffers(problem, buffers, len(self.first.sizes)))
        self.causes.extend(of_precision(problem, failed))

    def result(self) -> Certificate:
        problem = self.problem
        subject = {
            "samples": problem.samples,
            "steps": problem.steps,
            "ranks": ranks(),
            "micro_batch_size": max(self.first.sizes, default=0),
            "precision": precision_name(problem),
            "parameters": sum(p.numel() for p in problem.model.parameters()),
            "model": type(problem.model).__name__,
            "seed": problem.seed,
        }
        return Certificate(self.checks, self.causes, subject, environment(problem))


def _severity(check: Check) -> float:
    if check.figure != check.figure:
        return float("inf")
    return check.figure / check.bound if check.bound else check.figure * 1e300


@contextmanager
def undisturbed(problem: Problem) -> Iterator[None]:
    """Afterwards torch's random state is as before."""
    devices = [problem.device] if problem.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        yield


def _momentum(parameters: list[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9)


def _silent(stage: str) -> None: ...
