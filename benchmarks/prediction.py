"""The peak memory of an update, predicted from the model and two small measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace

from accumexp.accum import Peak, extrapolated, measure_peak

from .loops import HandWritten, built, saved_bytes, timed
from .tasks import Task

SMALL = (2, 6)  # micro-batches whose activations are measured


@dataclass(frozen=True)
class Predicted:
    """Bytes at the peak, by purpose; `total` includes what operators need while they run."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    data: int
    total: int


def predicted(task: Task) -> Predicted:
    """The peak of the hand-written loop, extrapolated from two small micro-batches.

    What a micro-batch of n samples saves for backward is a + b n. So is the memory that is allocated at every
    point of two updates, and the peak is the largest of these, as `python -m accumexp.plan` computes it.
    """
    saved: list[int] = []
    peaks: list[tuple[int, Peak]] = []
    steps = min(task.steps, 2)  # from the second one on, gradients exist
    parameters = optimizer = 0
    for n in SMALL:
        loop = built(HandWritten, replace(task, micro_batch=n, steps=1, samples=n))
        saved.append(saved_bytes(loop))
        parameters = sum(p.nbytes for p in loop.model.parameters())
        optimizer = sum(
            value.nbytes
            for state in loop.optimizer.state.values()
            for value in state.values()
            if value is not None
        )
        small = replace(task, micro_batch=n, steps=steps, samples=n * steps)
        del loop
        with measure_peak(task.device) as peak:
            loop = built(HandWritten, small)
            for _ in range(2):
                timed(loop)
        peaks.append((n, peak))
        del loop
    slope = (saved[1] - saved[0]) / (SMALL[1] - SMALL[0])
    activations = round(saved[0] + slope * (task.micro_batch - SMALL[0]))
    data = sum(tensor.nbytes for tensor in task.dataset().tensors)
    # The samples on the device, and the batch that is gathered from them.
    beside = 2 * data * (task.steps - steps) // task.steps
    total = extrapolated(peaks[0], peaks[1], task.micro_batch, beside=beside) - peaks[0][1].start
    return Predicted(parameters, parameters, optimizer, activations, data, total)
