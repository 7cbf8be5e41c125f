"""The peak of an update's memory, predicted from the model and two small measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace

from accumexp.accum import Peak, extrapolated, measure_peak

from .contenders import HandWritten, built, saved_bytes, timed
from .tasks import Task

SMALL = (2, 6)  # micro-batches whose activations are measured


@dataclass(frozen=True)
class Predicted:
    """Bytes at the peak, by what they are for, and in all: with what operators need while they run."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    data: int
    total: int


def predicted(task: Task) -> Predicted:
    """Parameters, their gradients, momentum, the task's samples, and what a micro-batch keeps for backward.

    The last is a + b n for a micro-batch of n samples: measured at two small n and drawn out. So is the peak,
    as `python -m accumexp.plan` does it, at every place of two updates: of the hand-written loop, for all.
    """
    saved: list[int] = []
    peaks: list[tuple[int, Peak]] = []
    steps = min(task.steps, 2)  # from the second on, gradients are there already
    parameters = optimizer = 0
    for n in SMALL:
        contender = built(HandWritten, replace(task, micro_batch=n, steps=1, samples=n))
        saved.append(saved_bytes(contender))
        parameters = sum(p.nbytes for p in contender.model.parameters())
        optimizer = sum(
            value.nbytes
            for state in contender.optimizer.state.values()
            for value in state.values()
            if value is not None
        )
        small = replace(task, micro_batch=n, steps=steps, samples=n * steps)
        del contender
        with measure_peak(task.device) as peak:
            contender = built(HandWritten, small)
            for _ in range(2):
                timed(contender)
        peaks.append((n, peak))
        del contender
    slope = (saved[1] - saved[0]) / (SMALL[1] - SMALL[0])
    activations = round(saved[0] + slope * (task.micro_batch - SMALL[0]))
    data = sum(tensor.nbytes for tensor in task.dataset().tensors)
    # What is resident, and the update's own batch of it.
    beside = 2 * data * (task.steps - steps) // task.steps
    total = extrapolated(peaks[0], peaks[1], task.micro_batch, beside=beside) - peaks[0][1].start
    return Predicted(parameters, parameters, optimizer, activations, data, total)
