"""The proof of one problem as a sequence of checks, and the causes of those that fail."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import torch

from . import draw_causes, overflows, window_checks, window_sizes
from .certificate import Cause, Certificate, Check, Counts, Series, worst_check
from .counts import decompose
from .evidence import Failure
from .float64 import DOUBLE
from .gradients import MAX_SKIPPED, Comparison, compare_window
from .hand_changes import Snapshot, hand_changed
from .micro_batches import micro_batches_check, passes_of
from .nested import batch_size
from .observation import Observation, observe
from .own_precision import OwnPrecisionReplay, precision_checks
from .problem import Problem, TrainingState, WholeBatch, cast, copy_in
from .ranks import all_gather, world_size
from .replay_float64 import Float64Replay
from .rounding import ExpectedUpdate, larger_batch_of
from .search import find_causes
from .second_passes import second_pass_check

# Updates that are replayed in the run's own precision: four whole and three smaller windows.
REPLAYED = 7
# Smaller windows after which the pattern of whole and smaller ones is moved by one update.
SMALLER_IN_A_ROUND = 3
# A relative error below which a cast to fp32 may be the reason.
NARROWED = 1e-5


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
        self.notes: list[str] = []
        self.replay: Float64Replay | None = None
        self.own_replay: OwnPrecisionReplay | None = None
        self.overflows: list[overflows.Overflow] = []

    def certificate(self, updates: int) -> Certificate:
        """Makes all checks, with `updates` replayed in fp64, and finds causes."""
        self.fix_draws()
        self.check_windows()
        self.progress(f"{updates} updates, one by one")
        self.replay_float64(updates)
        self.progress("a stop between two windows")
        self.add(window_checks.resume_check(self.problem, [self.batch(0), self.batch(1)]))
        self.find_causes()
        return self.result()

    def batch(self, number: int) -> WholeBatch:
        return self.problem.batches[number % len(self.problem.batches)]

    def replayed_batch(self, number: int, interval: int, dtype: torch.dtype) -> WholeBatch:
        """The batch of update `number`; a smaller one in the last of every `interval` updates.

        After every third of them there is one more whole window: what goes wrong in every third update, say,
        is told apart from what goes wrong in smaller windows.
        """
        batch = self.batch(number)
        usable = [batch for detail, batch in self.ragged if detail not in self.unusable]
        round_, place = divmod(number, SMALLER_IN_A_ROUND * interval + 1)
        if usable and place % interval == interval - 1:
            batch = usable[(SMALLER_IN_A_ROUND * round_ + place // interval) % len(usable)]
        return cast(batch, dtype)

    @cached_property
    def ragged(self) -> list[tuple[str, WholeBatch]]:
        """Descriptions and batches of smaller windows, see `window_sizes.ragged`."""
        if self.problem.drop_last:
            return []
        return window_sizes.ragged(self.problem, self.batch(0))

    def gradient_check(self, name: str, batch: WholeBatch, detail: str) -> Check:
        """Checks every parameter's gradient on `batch` in fp64.

        Undecided if the loop fails on a window with fewer samples than micro-batches.
        """
        try:
            comparison, observation, expected = compare_window(self.problem, batch)
        except Exception as error:
            if world_size() > 1:
                raise
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.unusable.append(detail)
            if batch_size(batch) < self.problem.steps:
                self.notes.append(f"the loop refuses a window of {detail}, fewer than steps: {text[:200]}")
                why = "a window with fewer samples than micro-batches may be refused"
                return Check(name, 0.0, 0.0, "relative", why, detail, decided=False)
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
        self.problem = problem = replace(problem, terms=tuple(exact.terms))
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
        self.add(micro_batches_check(problem, self.first, batch))
        changed = hand_changed(problem, cast(batch, DOUBLE), state, expected.larger.buffers)
        self.problem = problem = replace(problem, hand_changed=changed)
        self._count_micro_batches(batch, comparison, expected)
        self.progress("ragged and weighted windows")
        if self.ragged:
            name = "gradient, ragged last window"
            checks = [self.gradient_check(name, part, detail) for detail, part in self.ragged]
            decided = [check for check in checks if check.decided]
            self.add(worst_check(decided or checks))
        uneven = window_sizes.weighted(problem, batch)
        if uneven is not None:
            self.add(self.gradient_check("gradient, weighted items", uneven, "with ignored targets"))
        self.add(window_checks.buffers_check(problem, state, expected))
        # The windows so far have every size, and the updates that follow are of their kinds.
        problem.narrowing.possible = problem.narrowing.seen
        name = problem.precision_name
        if problem.dtype is not DOUBLE:
            self.progress(f"the gradient in {name}")
            self.add(*precision_checks(problem, name))
            if replay:
                self.progress(f"windows one after the other in {name}")
                self.keep_own_replay(self._replay_own_precision())
        self.progress("memory, ranks and overflow")
        self.add(window_checks.activations_check(problem, batch), window_checks.agreement_check(self.first))
        self.add(window_checks.collectives_check(problem, batch, self.reductions))
        self.overflows = overflows.overflows(problem, batch)
        self.add(*overflows.checks(problem, self.overflows), second_pass_check(problem, batch))

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

    def _replay_own_precision(self) -> OwnPrecisionReplay:
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
        return replay

    def keep_own_replay(self, replay: OwnPrecisionReplay) -> None:
        """Keeps the checks of updates in the run's own precision."""
        name = self.problem.precision_name
        self.own_replay = replay
        self.series.append(replay.series(name))
        self.checks.extend(replay.checks(name))

    def keep_replay(self, replay: Float64Replay) -> None:
        """Keeps the checks of updates in fp64."""
        self.replay = replay
        self.series.append(replay.series())
        self.checks.extend(replay.checks())
        self.causes.extend(replay.causes())

    def replay_float64(self, updates: int) -> None:
        """Checks updates from one start, about every third of them a smaller window."""
        problem = self.problem
        replay = self._replayed(updates)
        failure = replay.failure
        if failure is not None and not problem.narrowing.possible and failure.comparison.error < NARROWED:
            problem.narrowing.possible = True
            replay = self._replayed(updates)
        self.keep_replay(replay)
        if problem.clip_norm is not None and not replay.clipped:
            self.causes.append(draw_causes.never_clipped_cause(problem.clip_norm))

    def _replayed(self, updates: int) -> Float64Replay:
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
        return replay

    def find_causes(self) -> None:
        """Finds the causes of failed checks. An error of the search becomes a cause itself."""
        if all(check.passed for check in self.checks):
            return
        self.progress("why")
        causes, counts = find_causes(
            self.problem,
            self.checks,
            self.windows,
            self.replay,
            self.own_replay,
            self.overflows,
            passes_of(self.first, self.batch(0)),
        )
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
            self.checks,
            self.causes,
            subject,
            environment,
            series=self.series,
            counts=self.counts,
            notes=self.notes,
        )
