"""`certify`, and the proof as a sequence of checks."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from . import draw_causes, windows
from .arguments import batches_of, check_model, check_schedule
from .certificate import Cause, Certificate, Check, Counts, Series, worst_check
from .counts import decompose
from .evidence import Failure
from .float64 import DOUBLE
from .gradients import MAX_SKIPPED, Comparison, compare_window
from .observation import Observation, observe
from .outside import Snapshot
from .own_precision import OwnPrecisionReplay, precision_checks
from .problem import Problem, Scaling, TrainingState, TrainWindow, WholeBatch, cast, copy_in, forked_rng
from .ranks import all_gather, world_size
from .replay_float64 import Float64Replay
from .rounding import ExpectedUpdate, larger_batch_of
from .search import find_causes

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
    drop_last: bool = False,
    transform_gradient: Callable[[nn.Module], Any] | None = None,
    perturb: Callable[[nn.Module], Any] | None = None,
    state: Mapping[str, nn.Module | Tensor] | None = None,
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
        drop_last: whether the loop's loader drops the smaller last batch of an epoch: only whole windows are
            checked.
        transform_gradient: what the loop does to the window's whole gradient before it clips (an L2
            penalty, adaptive clipping); called with a model that has the larger batch's gradient in `.grad`,
            which it changes in place.
        perturb: moves the weights of the model it is called with by their `.grad`, in place; the update's
            gradient is then taken there (sharpness-aware minimisation).
        state: modules and tensors outside the model that the loop changes in place (an averaged copy, a
            loss's buffers). After every window they must be what the loop makes of them with `steps=1`.
            Frozen parameters and buffers of the model that the loop changes are compared in the same way.
        progress: called with a description when a stage begins.

    Raises:
        ValueError: for a batch that cannot be split into `steps`, a larger batch without a finite gradient,
            `updates` below 1, a model without trainable parameters or with lazy ones, a schedule whose
            `step()` needs arguments.
    """
    if updates < 1:
        raise ValueError(f"updates={updates}: without an update that is followed there is nothing to certify")
    batches = batches_of(batch)
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
        drop_last=drop_last,
        transform_gradient=transform_gradient,
        perturb=perturb,
        state=state or {},
    )
    if steps < 1 or problem.samples < steps * world_size():
        raise ValueError(f"steps={steps}: a batch of {problem.samples} samples cannot be split into them")
    with forked_rng(problem.device), torch.enable_grad():
        check_schedule(model, optimizer, scheduler)
        return Proof(problem, progress or (lambda stage: None)).certificate(updates)


class Proof:
    """The checks of one problem, and the search for causes where they fail.

    Attributes:
        checks, causes, series, counts: so far.
        problem: with its random draws held fixed, after `fix_draws`.
        windows: failures in windows of their own, from the first weights: the whole one first.
        replay, own_replay: of the updates, in fp64 and in the run's own precision.
        reductions: how often the ranks may reduce the gradient in a window.
    """

    def __init__(self, problem: Problem, progress: Callable[[str], None], reductions: int = 1) -> None:
        self.problem = problem
        self.reductions = reductions
        self.progress = progress
        self.checks: list[Check] = []
        self.causes: list[Cause] = []
        self.series: list[Series] = []
        self.counts: list[Counts] = []
        self.windows: list[Failure] = []
        self.unusable: list[str] = []
        self.replay: Float64Replay | None = None
        self.own_replay: OwnPrecisionReplay | None = None

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
        usable = [batch for detail, batch in self.ragged if detail not in self.unusable]
        if usable and number % interval == interval - 1:
            batch = usable[number // interval % len(usable)]
        return cast(batch, dtype)

    @cached_property
    def ragged(self) -> list[tuple[str, WholeBatch]]:
        """Descriptions and batches of smaller windows, see `windows.ragged`."""
        if self.problem.drop_last:
            return []
        return windows.ragged(self.problem, self.batch(0))

    def gradient_check(self, name: str, batch: WholeBatch, detail: str) -> Check:
        """Checks every parameter's gradient on `batch` in fp64."""
        try:
            comparison, observation, expected = compare_window(self.problem, batch)
        except Exception as error:
            if world_size() > 1:
                raise
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.unusable.append(detail)
            self.causes.append(
                Cause(
                    "error in the loop",
                    "",
                    f"the loop fails on a smaller window, {detail}: {text[:200]}",
                    math.nan,
                    "",
                    "handle windows of any size, or pass drop_last=True if the loader drops the last one",
                )
            )
            return Check(name, math.inf, 0.0, "relative", "the loop makes an update", detail)
        self.keep_failure(batch, comparison, observation, expected, detail)
        return comparison.as_check(name, detail)

    def keep_failure(
        self,
        batch: WholeBatch,
        comparison: Comparison,
        observation: Observation,
        expected: ExpectedUpdate,
        window: str = "",
    ) -> None:
        """Keeps a window from the first weights, if its gradient differs or it has not one optimizer step."""
        steps = all_gather(observation.steps)
        skipped = self.problem.scaling is not None and not max(steps)
        if not comparison.equal or (any(count != 1 for count in steps) and not skipped):
            model = copy_in(self.problem.model, DOUBLE)
            batch = cast(batch, DOUBLE)
            self.windows.append(Failure(batch, observation, expected, comparison, model, window=window))

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
        draws = draw_causes.find_draws(problem, batch)
        if draws.operators:
            self.problem, causes = draw_causes.fix_draws(problem, batch, draws)
            self.causes.extend(causes)
        if draws.unfixed:
            self.causes.append(draw_causes.unfixed_draws_cause(draws))

    def check_windows(self, replay: bool = True) -> None:
        """Checks single windows, and if `replay` some updates in the run's own precision."""
        problem, batch = self.problem, self.batch(0)
        self.progress("the gradient of every parameter, fp64")
        state = TrainingState(problem, DOUBLE)
        comparison, self.first, expected = compare_window(problem, batch, state)
        self.add(comparison.as_check("gradient, fp64"))
        self.keep_failure(batch, comparison, self.first, expected)
        self.add(windows.micro_batches_check(problem, self.first, batch))
        changed = windows.hand_changed(problem, state, expected.larger.buffers)
        self.problem = problem = replace(problem, hand_changed=changed)
        self._count_micro_batches(batch, comparison, expected)
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

    def _count_micro_batches(
        self, batch: WholeBatch, comparison: Comparison, expected: ExpectedUpdate
    ) -> None:
        """Keeps how often each micro-batch counts in a right window."""
        if not comparison.equal:
            return
        model = copy_in(self.problem.model, DOUBLE)
        parts = decompose(self.problem, Failure(cast(batch, DOUBLE), self.first, expected, comparison, model))
        fit = None if parts is None else parts.fit(parts.gradient)
        if parts is not None and fit is not None:
            self.counts.append(Counts("first window", parts.by_rank(fit.counts)))

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
        self.own_replay = replay
        self.series.append(replay.series(name))
        return replay.checks(name)

    def replay_float64(self, updates: int) -> None:
        """Checks updates from one start, every third of them a smaller window."""
        problem = self.problem
        state = TrainingState(problem, DOUBLE)
        replay = Float64Replay(problem, state)
        for number in range(updates):
            batch = self.replayed_batch(number, 3, DOUBLE)
            before = Snapshot.of(state) if problem.hand_changed or problem.state else None
            observation = observe(state, batch, arrivals=problem.scaling is not None)
            replay.compare(batch, observation, before)
            if observation.loss is not None and not replay.diverged:
                replay.compare_loss(replay.updates, observation.loss)
        self.replay = replay
        self.series.append(replay.series())
        self.checks.extend(replay.checks())
        self.causes.extend(replay.causes())
        if problem.clip_norm is not None and not replay.clipped:
            self.causes.append(draw_causes.never_clipped_cause(problem.clip_norm))

    def find_causes(self) -> None:
        """Finds the causes of failed checks. An error of the search becomes a cause itself."""
        if all(check.passed for check in self.checks):
            return
        self.progress("why")
        causes, counts = find_causes(self)
        self.causes = [*causes, *self.causes]
        self.counts = counts or self.counts

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
        return Certificate(
            self.checks, self.causes, subject, environment, series=self.series, counts=self.counts
        )
