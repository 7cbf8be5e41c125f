"""How large a micro-batch fits: predicted from small ones, and confirmed by a trial."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from ..accum import Peak, extrapolated, held_bytes, is_out_of_memory, steps_for
from ..config.sizes import AUTO, in_bytes, micro_batch
from ..environment.console import amount
from ..environment.memory import free_bytes
from ..errors import UsageError
from ..training.preflight import try_example
from .coupled_memory import CoupledMemory, coupled_memory, couples
from .points import Limit, Point
from .trial_run import TrialMeasurement, TrialRun, discard

# Samples of the small micro-batches that are measured; the last two give the prediction.
SMALL = (1, 2, 4)
# The share of free memory left to libraries and to gaps between tensors.
RESERVE = {"cuda": 0.05, "cpu": 0.10}
Stage = Callable[[str], None]
Measured = TypeVar("Measured")


class Planner:
    """Predicts and measures the memory of a run at every split of its batch.

    Raises:
        UsageError: if not even a micro-batch of one sample fits, or an evaluation does not.
    """

    def __init__(self, trial: TrialRun, stage: Stage = lambda stage: None) -> None:
        self.trial = trial
        self.stage = stage
        self.limit = memory_limit(trial)
        feeding = self._attempt(trial.feeding)
        if feeding is None:
            key = f"data.batch_size={trial.data.batch_size}"
            raise UsageError(f"{key}: {trial.device} cannot hold the samples of an update")
        self._feeding = feeding
        self._small = self._measure_small()
        self._coupled = self._measure_coupled()
        needed = self.evaluation(trial.data.evaluated)
        if len(self._small[2]) > 1 and needed > self.limit.bytes:  # one size gives an upper bound only
            self._refuse_evaluation(needed)

    def _attempt(self, measure: Callable[[], Measured]) -> Measured | None:
        """Returns `measure()`, or None and frees memory if it runs out of memory."""
        try:
            return measure()
        except Exception as error:
            if not out_of_memory(error):
                try_example(self.trial.experiment)  # names the key, where model, loss or metrics are wrong
                raise
        discard(self.trial.device)
        return None

    def _measure_small(self) -> dict[int, list[TrialMeasurement]]:
        """At most two micro-batch sizes, by the micro-batches of a window: 1, and 2 for two or more.

        A size that might not fit is not measured.
        """
        measured: list[TrialMeasurement] = []
        refused: str | None = None
        for size in SMALL:
            if measured:
                last = measured[-1]
                if _grown(last, max(last.update.peak, last.evaluation.peak), size) > self.limit.bytes:
                    break
            self.stage(f"micro-batches of {size}")
            try:
                measurement = self._attempt(partial(self.trial.small, size, 2))
            except ValueError as error:  # a BatchNorm of one sample
                refused = str(error)  # the error itself would keep its tensors alive
                continue
            if measurement is None:
                refused = None
                break
            measured.append(measurement)
            if measurement.update.peak > self.limit.bytes:
                break
        if not measured and refused is not None:
            raise UsageError(f"accum.steps={AUTO}: no micro-batch could be tried: {refused}")
        if not any(one.update.peak <= self.limit.bytes for one in measured):
            least = amount(measured[0].update.peak) if measured else f"more than {self.trial.device} has"
            micro = measured[0].micro if measured else SMALL[0]
            raise self._too_little(micro, f"needs {least}")
        several = measured[-2:]
        single: list[TrialMeasurement] = []
        for one in several:
            if one.update.peak <= self.limit.bytes:
                measurement = self._attempt(partial(self.trial.small, one.micro, 1))
                if measurement is None:
                    break
                single.append(measurement)
        return {2: several, 1: single or several}

    def _measure_coupled(self) -> CoupledMemory | None:
        if not couples(self.trial):
            return None
        self.stage("the loss on the outputs of an update")
        if (measured := self._attempt(partial(coupled_memory, self.trial))) is None:
            raise UsageError(
                f"data.batch_size={self.trial.data.batch_size}: the loss couples all samples of an update, "
                f"and {self.trial.device} cannot hold it; take fewer"
            )
        return measured

    @property
    def batch_bytes(self) -> int:
        """Bytes of the data during a window of the whole batch."""
        return self._feeding.end - self._feeding.start

    def predicted_peak(self, steps: int) -> int:
        """The peak of updates of the whole batch in `steps`, in bytes."""
        data = self.trial.data
        samples = min(data.batch_size, data.samples)
        made = steps_for(samples, data.batch_size, steps)
        micro = micro_batch(samples, made, self.trial.ranks)
        measured = self._small[min(made, 2)]
        window = self._line(measured, lambda one: one.update, micro)
        ends = max(one.update.end for one in self._small[2])
        if self._coupled is not None:
            # The trials keep the outputs of their own samples.
            window += (samples - min(made, 2) * micro) * self._coupled.sample
            window = max(window, ends + self.batch_bytes + self._coupled.loss)
        return max(window, ends + self._feeding.peak - self._feeding.start)

    def evaluation(self, samples: int) -> int:
        """The peak of an evaluation by so many samples, in bytes."""
        return self._line(self._small[2], lambda one: one.evaluation, samples)

    def parts(self, point: Point) -> dict[str, int]:
        """Bytes by what they hold at `point`; they are not all alive at the same time.

        "temporary" holds gradients of activations and the memory of operators, optimizer and callbacks.
        """
        small = self._small[2]
        one, two = small[0], small[-1]
        saved = one.activations * point.micro_batch // one.micro
        if two is not one:
            saved = _on_line((one.micro, one.activations), (two.micro, two.activations), point.micro_batch)
        sizes = {
            "parameters": one.parameters,
            "gradients": one.gradients,
            "optimizer state": one.state,
            **self.trial.beside,
            "data": held_bytes(self.trial.held) - one.parameters + self.batch_bytes,
            "saved activations": saved,
        }
        peak = point.predicted if point.measured is None else point.measured
        return {**sizes, "temporary": max(0, peak - sum(sizes.values()))}

    def _line(
        self, measured: list[TrialMeasurement], peak_of: Callable[[TrialMeasurement], Peak], size: int
    ) -> int:
        """The peak at `size`, with the whole batch beside it instead of the small one."""
        if len(measured) == 1:
            (one,) = measured
            return _grown(one, peak_of(one).peak, size) + self.batch_bytes - one.batch
        a, b = measured
        batch = _on_line((a.micro, a.batch), (b.micro, b.batch), size)
        return extrapolated(
            (a.micro, peak_of(a)), (b.micro, peak_of(b)), size, beside=self.batch_bytes - batch
        )

    def splits(self) -> Iterator[int]:
        """The numbers of steps with distinct micro-batch sizes, in ascending order."""
        batch, ranks = self.trial.data.batch_size, self.trial.ranks
        before = None
        for steps in range(1, batch // ranks + 1):
            micro = micro_batch(batch, steps, ranks)
            if micro != before:
                yield steps
            before = micro

    def measure(self, steps: int) -> Point:
        """A trial of `steps`: two updates and an evaluated batch, measured."""
        trial, predicted = self.trial, self.predicted_peak(steps)
        micro = micro_batch(trial.data.batch_size, steps, trial.ranks)
        self.stage(f"{steps} micro-batches of {micro}")
        point = Point(steps, micro, predicted, False)
        try:
            measurement = self._attempt(partial(trial.whole, steps))
        except ValueError as error:
            return replace(point, trouble=str(error).splitlines()[0])
        if measurement is None:
            return replace(point, trouble="out of memory")
        if measurement.evaluation.peak > self.limit.bytes:
            self._refuse_evaluation(measurement.evaluation.peak)
        measured = measurement.update.peak
        return replace(point, measured=measured, fits=measured <= self.limit.bytes)

    def choose(self) -> Point:
        """The fewest steps that fit: predicted, then measured; further steps only if that does not fit.

        Raises:
            UsageError: if none do.
        """
        factor = 1.0  # measured to predicted, over the trials that did not fit
        last: Point | None = None
        for steps in self.splits():
            if self.predicted_peak(steps) * factor > self.limit.bytes:
                continue
            last = self.measure(steps)
            if last.fits:
                return last
            factor = max(factor * 1.02, (last.measured or 0) / last.predicted)
        finest = self.trial.data.batch_size // self.trial.ranks
        predicted = self.predicted_peak(finest)
        if last is None:
            raise self._too_little(1, f"needs {amount(predicted)}")
        if last.steps != finest and predicted <= self.limit.bytes:
            last = self.measure(finest)
            if last.fits:
                return last
        measured, trouble = last.measured, last.trouble
        needs = f"does not run ({trouble})" if measured is None else f"needs {amount(measured)}"
        raise self._too_little(last.micro_batch, needs)

    def _too_little(self, micro: int, needs: str) -> UsageError:
        trial = self.trial
        samples = "one sample" if micro == 1 else f"{micro} samples"
        data = held_bytes(trial.data.held)
        beside = (
            f", of which the data set takes {amount(data)} unless data.resident=false"
            if 2 * data > self.limit.bytes
            else ""
        )
        return UsageError(
            f"accum.steps={AUTO}: an update with {samples} a micro-batch {needs}, and the limit is "
            f"{self.limit}{beside}; a smaller data.batch_size, model or optimizer state needs less"
        )

    def _refuse_evaluation(self, needed: int) -> None:
        size, ranks = self.trial.data.evaluated, self.trial.ranks
        fewer = bisect_right(range(1, size), self.limit.bytes, key=self.evaluation)
        least = f"at most data.eval_batch_size={fewer * ranks} fits" if fewer else "not one sample fits"
        raise UsageError(
            f"data.eval_batch_size={self.trial.data.eval_batch_size}: an evaluation needs "
            f"{amount(needed)}, and the limit is {self.limit}; {least}"
        )


def memory_limit(trial: TrialRun) -> Limit:
    """`accum.memory_limit`, or the free memory of the device less a reserve."""
    limit, device = trial.config.accum.memory_limit, trial.device
    if limit is not None:
        return Limit(in_bytes("accum.memory_limit", limit), "accum.memory_limit")
    held = held_bytes(trial.held)
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
    share = 1 if device.type == "cuda" else trial.local_ranks
    reserve = RESERVE.get(device.type, 0.1)
    most = int((free_bytes(device) / share + held) * (1 - reserve))
    return Limit(most, f"the free memory of {device}, less {reserve:.0%}")


def out_of_memory(error: Exception) -> bool:
    """Whether `error` is a failed allocation, or was raised from one."""
    return any(is_out_of_memory(one) for one in (error, error.__cause__) if one is not None)


def _grown(one: TrialMeasurement, peak: int, micro: int) -> int:
    """An upper bound of `peak` with a larger micro-batch, from a measured one.

    Backward makes a gradient as large as each saved activation, and operators need as much again.
    """
    return peak + 4 * one.activations * (micro - one.micro) // one.micro


def _on_line(first: tuple[int, int], second: tuple[int, int], at: int) -> int:
    (a, p), (b, q) = first, second
    return round(p + (q - p) * (at - a) / (b - a))
