"""The replay of updates in fp64: gradients, losses, samples, learning rates, optimizer and loss scale."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from itertools import chain

from .certificate import Cause, Check, Series, excess, worst_check
from .draw_causes import repeated_draws, repeated_draws_cause
from .evidence import Failure, updates_in_words
from .float64 import DOUBLE
from .gradients import Comparison, arrives_scaled, common_factor, compare, measured_loss_scale
from .hand_changes import HandChanges, Snapshot
from .larger_batch import Gradient, loss_weight
from .learning_rates import LearningRates
from .micro_batches import MicroBatchesMade
from .nested import batch_size
from .observation import Observation
from .problem import Problem, TrainingState, WholeBatch, is_large
from .ranks import all_gather, worst
from .replay import BITS, ONE_STEP, Replay, tensors_of
from .rounding import U32, ExpectedUpdate, expected_update
from .sample_ids import SampleIds
from .state_causes import LoggedLoss
from .weight_causes import ChangedWeights
from .window_checks import STATISTICS, buffer_errors

# For a large model the larger batch is computed in the first EVERY_UNTIL updates, for every window that is
# smaller than usual, and for every SELDOM-th; the rest is compared in all.
EVERY_UNTIL = 10
SELDOM = 10
SCHEDULED = "the schedule is stepped once an update"
EVERY_SAMPLE = "every sample is passed to the model in its window, or the gradient shows that it counts"
LOGGED = "fp64 rounding of the larger batch's mean loss, and of one that is added up in fp32: (N+1) u of it"


class Float64Replay(Replay):
    """Compares a loop's updates in fp64.

    Attributes:
        clipped: number of updates whose gradient was longer than `clip_norm`.
        losses: the larger batch's loss, and the bound of its error, by update.
        failure: the first update whose gradient differs, or that has not one optimizer step.
        changed: the updates after which the weights differ although the optimizer's steps are right.
        logged: the first update whose logged loss differs.
        scale_is_measured: whether what autograd delivered is the larger batch's gradient but for a factor, in
            every update; else that factor need not be the loss scale.
    """

    def __init__(self, problem: Problem, state: TrainingState) -> None:
        super().__init__(problem, state, DOUBLE)
        self.clipped = 0
        self.losses: dict[int, tuple[float, float]] = {}
        self.failure: Failure | None = None
        self.changed: ChangedWeights | None = None
        self.logged: LoggedLoss | None = None
        self.scale_is_measured = True
        self._comparisons: list[tuple[int, Comparison]] = []
        self._buffers: list[tuple[int, float, float, str]] = []
        self._repeated: list[tuple[int, int]] = []
        self._wrong_steps: list[int] = []
        self._smaller: dict[int, str] = {}
        self._made = MicroBatchesMade(problem)
        self._latest: Failure | None = None
        self._factors: dict[int, float | None] = {}
        self._window_weights: dict[int, float] = {}
        self._previous: Gradient | None = None
        self._before: Gradient = {}
        self._loss: Check | None = None
        self._losses_at: list[int] = []
        self._wrong_losses: list[int] = []
        self._rates = LearningRates(problem)
        self._by_hand = HandChanges(problem, problem.hand_changed)
        self._scales: list[tuple[int, float, float]] = []
        self._interval = SELDOM if is_large(self.model) else 1

    def compare(self, batch: WholeBatch, observation: Observation, before: Snapshot | None = None) -> None:
        """Compares the update that the loop has just made on `batch`. A collective call.

        Args:
            before: the loop's state before it, where the loop changes something by hand.
        """
        if self.diverged:
            return
        with self.problem.outside_as(dict(observation.outside)):
            self._compare(batch, observation)
        if before is not None and not self.diverged:
            self._by_hand.compare(self.updates, before, self.state, batch, observation.outside_changes)

    def _compare(self, batch: WholeBatch, observation: Observation) -> None:
        number = self.updates + 1
        smaller = self._is_smaller(batch)
        missing = self._missing_samples(batch, observation)
        if number <= EVERY_UNTIL or number % self._interval == 0 or smaller or missing:
            expected = expected_update(self.problem, batch, self.model, self.problem.clip_norm)
            figures = [expected.size, expected.loss, expected.loss_bound, *expected.bounds.values()]
            if not all(all_gather(all(map(math.isfinite, figures)))):
                self.diverged = True
                return
            equal = self._compare_gradient(number, batch, observation, expected)
            self._compare_buffers(number, expected)
            if equal and not self._gradient_hides_samples:
                missing = 0
        self.updates = number
        self._previous = observation.gradient
        self._record("samples", missing)
        self._record("number of updates", abs(observation.steps - 1))
        self._made.compare(number, batch, observation, smaller)
        self._repeated.append((number, repeated_draws(self.problem, observation)))
        passes = len(observation.sizes)
        self._record("learning rate", self._rates.compare(observation.rates, self.optimizer, passes))
        self._before = before = self._weights()
        self._step_optimizer(observation)
        if observation.gradient is not None:
            self._step_schedule()
        expected_weights = self._weights()
        same = tensors_of(self.optimizer).keys() == tensors_of(self.state.optimizer).keys()
        parameters, optimizer = self._take_over()
        parameters = {n: error for n, error in parameters.items() if n not in self.problem.hand_changed}
        self._record("parameters", worst(list(parameters.values())))
        self._record("optimizer state", worst([0.0, *optimizer.values()]) if same else math.inf)
        if not max(parameters.values()) <= self._bit_bound:
            names = [name for name, error in parameters.items() if not error <= self._bit_bound]
            entries = [name for (_, name), error in optimizer.items() if not error <= self._bit_bound]
            if self.changed is None:
                weights = before, expected_weights, self._weights()
                entries = list(dict.fromkeys(entries))
                self.changed = ChangedWeights(batch, observation, names, *weights, entries)
            self.changed.updates.append(number)

    def _weights(self) -> Gradient:
        """A copy of the weights; empty for a large model."""
        if self._interval > 1:
            return {}
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def _compare_gradient(
        self, number: int, batch: WholeBatch, observation: Observation, expected: ExpectedUpdate
    ) -> bool:
        self.clipped += self.problem.clip_norm is not None and expected.size > self.problem.clip_norm
        comparison = compare(observation.gradient, expected)
        self._comparisons.append((number, comparison))
        if not comparison.equal:
            self._factors[number] = common_factor(observation.gradient, expected.gradient)
        with self.problem.loss_in(DOUBLE) as loss:
            weight = self._window_weights[number] = float(loss_weight(loss, batch[1], batch_size(batch)))
        steps = all_gather(observation.steps)
        if any(count != 1 for count in steps):
            self._wrong_steps.append(number)
        if batch_size(batch) < self._full:
            self._smaller[number] = f"{batch_size(batch)} of {self._full} samples"
        if self.failure is None and (not comparison.equal or any(count != 1 for count in steps)):
            model = copy.deepcopy(self.model)
            self.failure = Failure(batch, observation, expected, comparison, model, self._previous)
            self.failure.window = self._smaller.get(number, "")
        elif not comparison.equal and batch_size(batch) == self._full and self._interval == 1:
            model = copy.deepcopy(self.model)
            self._latest = Failure(batch, observation, expected, comparison, model, updates=[number])
        # The logged loss is added up in fp32 and rounded once more.
        rounding = (len(observation.sizes) + 1) * U32 * abs(expected.loss)
        self.losses[number] = (expected.loss, expected.loss_bound + rounding)
        self._last = (number, batch, observation)
        scaled = self.problem.scaling is not None and any(all_gather(bool(observation.arrived)))
        if scaled and expected.size:  # a gradient of zeros does not show the scale
            scale = measured_loss_scale(observation, expected.larger.gradient)
            # What arrives may be a sum that the loop divides later: windows of the same weight are compared.
            self._scales.append((number, scale, weight))
            self.scale_is_measured &= arrives_scaled(observation, expected.larger.gradient)
        return comparison.equal

    @property
    def _gradient_hides_samples(self) -> bool:
        """Whether a gradient may be right without a sample that counts: clamped elements are alike."""
        return self.problem.clip_value is not None or self.problem.transform_gradient is not None

    def _compare_buffers(self, number: int, expected: ExpectedUpdate) -> None:
        """Compares the buffers after the loop's window with those after the larger batch."""
        if self.problem.perturb is not None:
            return
        errors, bounds = buffer_errors(self.problem, self.state, expected), expected.buffer_bounds
        if errors:
            name = max(errors, key=lambda key: excess(errors[key], bounds[key]))
            self._buffers.append((number, worst(all_gather(errors[name])), bounds[name], name))

    def compare_loss(self, update: int, loss: float) -> None:
        """Compares the loss that the loop logged for `update`, if that update's gradient was compared."""
        if update in self.losses:
            self._losses_at.append(update)
            expected, bound = self.losses[update]
            error = abs(loss - expected)
            at = f"worst at update {update}" if error else "no difference"
            check = Check("logged loss", error, bound, "loss", LOGGED, at)
            if not check.passed:
                self._wrong_losses.append(update)
                if self.logged is None and self._last[0] == update:
                    updates = self._wrong_losses, self._losses_at
                    self.logged = LoggedLoss(update, loss, expected, *self._last[1:], self._before, *updates)
            self._loss = check if self._loss is None else worst_check([self._loss, check])

    def _missing_samples(self, batch: WholeBatch, observation: Observation) -> int:
        """The samples that the model is not seen to receive, or by how much the number of rows is off.

        Some add nothing (ignored targets, a weight of 0), others come by another way (packed into one row,
        cut and padded, through a copy of the model). Then the gradient tells that all of them count.
        """
        sizes = sum(map(sum, all_gather(observation.sizes)))
        micro_batches = list(chain.from_iterable(all_gather(observation.micro_batches)))
        if any(numbers is None for numbers in micro_batches):
            return abs(batch_size(batch) - sizes)
        # Ranks cannot tell equal samples apart, so these are counted together.
        first = SampleIds(batch[0]).first_equal()
        counts = Counter(first[number] for numbers in micro_batches for number in numbers or ())
        # Doubled samples show in the gradient; a rank without samples computes on another's as padding.
        return (Counter(first.values()) - counts).total()

    def checks(self) -> list[Check]:
        """The worst figures over all updates that were compared. A collective call."""
        over = f"{self.updates} updates"
        checks = [
            self._gradient_check(over),
            *filter(None, [self._buffers_check(over), self._by_hand.check()]),
            self._check(f"parameters, {over}", "parameters", self._bit_bound, BITS),
            self._check(f"optimizer state, {over}", "optimizer state", self._bit_bound, BITS),
            self._check(f"learning rate, {over}", "learning rate", 0.0, SCHEDULED),
        ]
        if self.changed is not None:
            self.changed.compared = list(range(1, self.updates + 1))
            self.changed.windows = self._smaller
        if self._loss is not None:
            checks.append(replace(worst_check(all_gather(self._loss)), name=f"logged loss, {over}"))
        checks.append(self._check("number of updates", "number of updates", 0.0, ONE_STEP, "count"))
        checks.append(self._made.check(f"micro-batches, {over}"))
        checks.append(self._check("samples", "samples", 0.0, EVERY_SAMPLE, "count"))
        if self.problem.scaling is not None and self._scales:
            checks.append(self._scale_check())
        return checks

    def causes(self) -> list[Cause]:
        """Why learning rates are wrong, and draws repeated after the first window."""
        error, *_ = self._worst.get("learning rate", (0.0, 0, ""))
        causes = self._rates.causes(self._smaller) if error else []
        repeating = [number for number, count in self._repeated if count]
        if repeating and not self._repeated[0][1]:
            most = max(count for _, count in self._repeated)
            when = updates_in_words(repeating, [number for number, _ in self._repeated])
            causes.append(repeated_draws_cause(self.problem, most, when))
        return causes

    def _gradient_check(self, over: str) -> Check:
        if not self._comparisons:
            return Comparison(0.0, 0.0, "", 0.0, 0.0).as_check(f"gradient, {over}", over)
        number, comparison = max(self._comparisons, key=lambda entry: entry[1].ratio)
        if self.failure is not None:
            self.failure.compared = [n for n, _ in self._comparisons]
            self.failure.steps = self._wrong_steps
            failing = {n for n, c in self._comparisons if not c.equal} | set(self._wrong_steps)
            self.failure.updates = sorted(failing)
            self.failure.smaller = list(self._smaller)
            self.failure.factors, self.failure.weights = self._factors, self._window_weights
            self.failure.latest = self._latest
        detail = f"update {number}" if comparison.ratio else over
        if len(self.losses) < self.updates:
            detail += f", {len(self.losses)} of them compared"
        if self.problem.clip_norm is not None:
            detail += f", clipped in {self.clipped}"
        if self.diverged:
            detail += ", after which the larger batch itself diverges"
        return comparison.as_check(f"gradient, {over}", detail)

    def _buffers_check(self, over: str) -> Check | None:
        if not self._buffers:
            return None
        number, figure, bound, name = max(self._buffers, key=lambda entry: excess(*entry[1:3]))
        failing = [n for n, error, most, _ in self._buffers if not error <= most]
        when = updates_in_words(failing, [n for n, *_ in self._buffers]) if failing else ""
        at = f"worst at {name}, update {number}" if figure else "no difference"
        return Check(
            f"buffers, {over}", figure, bound, "relative", STATISTICS, ", ".join(filter(None, (at, when)))
        )

    def series(self) -> Series:
        """The worst parameter's error by update, and its bound."""
        return Series(
            "gradient, fp64",
            "relative",
            [number for number, _ in self._comparisons],
            [comparison.figure for _, comparison in self._comparisons],
            [comparison.bound for _, comparison in self._comparisons],
        )

    def _scale_check(self) -> Check:
        scaling = self.problem.scaling
        assert scaling is not None
        errors = []
        references: dict[float, float] = {}
        for update, scale, weight in self._scales:
            growths = (update - 1) // scaling.growth_interval
            first = references.setdefault(weight, scale / scaling.growth_factor**growths)
            error = abs(math.log(max(scale / first, 1e-300)) - growths * math.log(scaling.growth_factor))
            errors.append((error, update, scale / first))
        error, update, ratio = max(errors, key=lambda item: item[0])
        if error <= 0.01:
            _, update, ratio = errors[-1]
        interval = f"{scaling.growth_interval} windows without an overflow"
        grows = f"it grows {scaling.growth_factor:g}-fold after {interval}"
        detail = f"{ratio:g} times the first in update {update}"
        return Check("loss scale by update", error, 0.01, "log ratio", grows, detail)
