"""`certify`, and the proof as a sequence of checks."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from . import diagnosis, windows
from .arguments import batches_of, check_model, check_schedule, told_apart
from .certificate import Cause, Certificate, Check, worst_check
from .float64 import DOUBLE
from .gradients import MAX_SKIPPED, compare_window
from .loop_causes import loop_causes
from .observation import observe
from .own_precision import OwnPrecisionReplay, precision_checks
from .problem import Problem, Scaling, TrainingState, TrainWindow, WholeBatch, cast, copy_in, forked_rng
from .ranks import all_gather, world_size
from .replay_float64 import Float64Replay
from .rounding import larger_batch_of

# Updates that are replayed in the run's own precision: four whole and three smaller windows.
REPLAYED = 7


def certify(
    train_window: TrainWindow,
    model: nn.Module,
    loss: Callable[..., Any],
    batch: WholeBatch | Sequence[WholeBatch],
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
    clip_value: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Certificate:
    """Certifies that `train_window` makes the update of the larger batch, or says why it does not.

    The loop runs on copies of `model`, in fp64 and in its own precision, and is observed through hooks.
    The larger batch's update is computed on the whole batch in one piece. Under
    torch.distributed every rank calls with the whole batch, of which its loop takes its share.

    Args:
        train_window: called as `train_window(model, optimizer, batch, steps)`, with the schedule as a
            fifth argument if there is one. Makes one update of `model` on `batch`, (inputs, targets) of all
            its samples, in `steps` micro-batches (fewer for the smaller last batch of an epoch), clips, steps
            and zeroes. May return the loss that it would log.
        model: in the mode it is trained in. It is not changed.
        loss: a function of (outputs, targets) to a mean, of shape (); or an object with `weight(targets)` and
            `total(outputs, targets)`, whose quotient is the mean. If it has tensors (class weights), the
            loop's criterion should be the same object: it is moved to fp64 and back with the model.
        batch: (inputs, targets) of one update, samples first; or a list of several such pairs, of which the
            first is a whole batch. A single batch whose inputs and targets are both pairs must be in a list.
        steps: micro-batches in a full window, on each rank.
        optimizer: makes the loop's optimizer from parameters; SGD with momentum by default.
        scheduler: makes the schedule from an optimizer; the loop steps it once an update.
        clip_norm: the 2-norm to which the loop clips the update's gradient.
        prepare: wraps a copy of the model before its optimizer is made (DistributedDataParallel,
            fully_shard); its result is the loop's `model`.
        precision: dtype of the parameters in the loop's own precision.
        autocast: dtype of its `torch.autocast`, which the loop itself enters.
        loss_scale: the settings of its loss scale, if it has a dynamic one.
        updates: number of updates that are replayed in fp64, at least 1.
        seed: of torch's generators in every window.
        clip_value: the largest absolute value of its elements, which the loop clamps after `clip_norm`.
        progress: called with a description when a stage begins.

    Raises:
        ValueError: for a batch that cannot be split into `steps`, a larger batch without a finite gradient,
            `updates` below 1, a model without trainable parameters or with lazy ones, a schedule whose
            `step()` needs arguments.
    """
    if updates < 1:
        raise ValueError(f"updates={updates}: without an update that is followed there is nothing to certify")
    batches, notes = told_apart(batches_of(batch))
    check_model(model)
    optimizer = optimizer or partial(SGD, lr=0.1, momentum=0.9)
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
        clip_value=clip_value,
    )
    if steps < 1 or problem.samples < steps * world_size():
        raise ValueError(f"steps={steps}: a batch of {problem.samples} samples cannot be split into them")
    with forked_rng(problem.device), torch.enable_grad():
        check_schedule(model, optimizer, scheduler)
        certificate = Proof(problem, progress or (lambda stage: None)).certificate(updates)
        return replace(certificate, notes=notes)


class Proof:
    """The checks of one problem, and the search for causes where they fail.

    Attributes:
        checks, causes: so far.
        problem: with its random draws held fixed, after `fix_draws`.
        reductions: how often the ranks may reduce the gradient in a window.
    """

    def __init__(self, problem: Problem, progress: Callable[[str], None], reductions: int = 1) -> None:
        self.problem = problem
        self.reductions = reductions
        self.progress = progress
        self.checks: list[Check] = []
        self.causes: list[Cause] = []

    def certificate(self, updates: int) -> Certificate:
        """Makes all checks, with `updates` replayed in fp64, and finds causes."""
        self.fix_draws()
        self.check_windows()
        self.progress(f"{updates} updates, one by one")
        self.replay_float64(updates)
        self.progress("a stop between two windows")
        self.add(windows.resume_check(self.problem, [self.batch(0), self.batch(1)]))
        self.find_causes()
        return self.result()

    def batch(self, number: int) -> WholeBatch:
        return self.problem.batches[number % len(self.problem.batches)]

    def replayed_batch(self, number: int, interval: int, dtype: torch.dtype) -> WholeBatch:
        """The batch of update `number`; a smaller one in the last of every `interval` updates."""
        batch = self.batch(number)
        if self.ragged and number % interval == interval - 1:
            _, batch = self.ragged[number // interval % len(self.ragged)]
        return cast(batch, dtype)

    @cached_property
    def ragged(self) -> list[tuple[str, WholeBatch]]:
        """Descriptions and batches of smaller windows, see `windows.ragged`."""
        return windows.ragged(self.problem, self.batch(0))

    def gradient_check(self, name: str, batch: WholeBatch, detail: str) -> Check:
        """Checks every parameter's gradient on `batch` in fp64."""
        return compare_window(self.problem, batch)[0].as_check(name, detail)

    def add(self, *checks: Check | None) -> None:
        self.checks.extend(check for check in checks if check is not None)

    def fix_draws(self) -> None:
        """Finds what the model draws, and holds it fixed from here on.

        Raises:
            ValueError: if the larger batch's gradient is not finite.
        """
        self.progress("what the model draws")
        problem, batch = self.problem, self.batch(0)
        exact = larger_batch_of(problem, copy_in(problem.model, DOUBLE), batch)
        finite = all(bool(g.isfinite().all()) for g in exact.gradient.values())
        if not all(all_gather(finite)):
            raise ValueError("the larger batch's own gradient is not finite: there is nothing to be equal to")
        draws = diagnosis.find_draws(problem, batch)
        if draws.operators:
            self.problem, causes = diagnosis.fix_draws(problem, batch, draws)
            self.causes.extend(causes)
        if draws.unfixed:
            self.causes.append(diagnosis.unfixed_draws_cause(draws))

    def check_windows(self, replay: bool = True) -> None:
        """Checks single windows, and if `replay` some updates in the run's own precision."""
        problem, batch = self.problem, self.batch(0)
        self.progress("the gradient of every parameter, fp64")
        state = TrainingState(problem, DOUBLE)
        comparison, self.first, expected = compare_window(problem, batch, state)
        self.add(comparison.as_check("gradient, fp64"))
        self.progress("ragged and weighted windows")
        if self.ragged:
            name = "gradient, ragged last window"
            self.add(worst_check(self.gradient_check(name, part, detail) for detail, part in self.ragged))
        uneven = windows.weighted(problem, batch)
        if uneven is not None:
            self.add(self.gradient_check("gradient, weighted items", uneven, "with ignored targets"))
        self.add(windows.buffers_check(problem, state, expected.larger.buffers))
        name = problem.precision_name
        if problem.dtype is not DOUBLE:
            self.progress(f"the gradient in {name}")
            self.add(*precision_checks(problem, name))
            if replay:
                self.progress(f"windows one after the other in {name}")
                self.add(*self._replay_own_precision(name))
        self.progress("memory, ranks and overflow")
        self.add(windows.activations_check(problem, batch), windows.agreement_check(self.first))
        self.add(windows.collectives_check(problem, batch, self.reductions))
        self.add(*windows.overflow_checks(problem, batch))

    def _replay_own_precision(self, name: str) -> list[Check]:
        problem = self.problem
        state = TrainingState(problem, problem.dtype)
        replay = OwnPrecisionReplay(problem, state)
        skips_left = MAX_SKIPPED if problem.scaling is not None else 0
        for number in range(REPLAYED):
            batch = self.replayed_batch(number, 2, problem.dtype)
            while True:
                observation = observe(state, batch, arrivals=True)
                replay.compare(batch, observation)
                if not skips_left or max(all_gather(observation.steps)):
                    break
                skips_left -= 1
        return replay.checks(name)

    def replay_float64(self, updates: int) -> None:
        """Checks updates from one start, every third of them a smaller window."""
        problem = self.problem
        state = TrainingState(problem, DOUBLE)
        replay = Float64Replay(problem, state)
        for number in range(updates):
            batch = self.replayed_batch(number, 3, DOUBLE)
            observation = observe(state, batch, arrivals=problem.scaling is not None)
            replay.compare(batch, observation)
            if observation.loss is not None and not replay.diverged:
                replay.compare_loss(replay.updates, observation.loss)
        self.checks.extend(replay.checks())
        self.causes.extend(replay.causes())
        if problem.clip_norm is not None and not replay.clipped:
            self.causes.append(diagnosis.never_clipped_cause(problem.clip_norm))

    def find_causes(self) -> None:
        """Finds the causes of failed checks. An error of the search becomes a cause itself."""
        failed = [check for check in self.checks if not check.passed]
        if not failed:
            return
        self.progress("why")
        try:
            self._find_causes(failed)
        except Exception as error:
            text = f"the search for the cause failed: {type(error).__name__}: {' '.join(str(error).split())}"
            advice = "the checks that failed stand without it"
            self.causes.append(Cause("unknown", "", text, math.nan, "", advice))

    def _find_causes(self, failed: list[Check]) -> None:
        problem, batch = self.problem, self.batch(0)
        uneven = windows.weighted(problem, batch)
        others = [smaller for _, smaller in self.ragged] + ([] if uneven is None else [uneven])
        causes = diagnosis.diagnose(problem, batch, others)
        if not causes and any(check.name.startswith("gradient") for check in failed):
            causes = diagnosis.gradient_carried_over(problem, [batch, self.batch(1)])
            causes = causes or loop_causes(problem, batch)
        self.causes.extend(causes)
        buffers = next((check for check in failed if check.name == "buffers"), None)
        if buffers is not None:
            self.causes.append(diagnosis.buffers_cause(problem, buffers, len(self.first.sizes)))
        self.causes.extend(diagnosis.low_precision_causes(problem, failed))

    def result(self) -> Certificate:
        problem = self.problem
        subject = {
            "samples": problem.samples,
            "steps": problem.steps,
            "ranks": world_size(),
            "micro_batch_size": max(self.first.sizes, default=0),
            "precision": problem.precision_name,
            "parameters": sum(p.numel() for p in problem.model.parameters()),
            "model": type(problem.model).__name__,
            "seed": problem.seed,
        }
        device = problem.device
        processor = platform.processor() or platform.machine()
        if device.type == "cuda":
            processor = torch.cuda.get_device_name(device)
        environment = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": f"{device.type} ({processor})",
            "threads": torch.get_num_threads(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        return Certificate(self.checks, self.causes, subject, environment)
