"""The peak of an update's memory, predicted from the model and two small measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .contenders import HandWritten, built, saved_bytes
from .tasks import Task

SMALL = (2, 6)  # micro-batches whose activations are measured


@dataclass(frozen=True)
class Predicted:
    """Bytes at the peak, by what they are for."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    data: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.data


def predicted(task: Task) -> Predicted:
    """Parameters, their gradients, momentum, the task's samples, and what a micro-batch keeps for backward.

    The last is a + b n for a micro-batch of n samples: measured at two small n and drawn out.
    """
    saved: list[int] = []
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
    slope = (saved[1] - saved[0]) / (SMALL[1] - SMALL[0])
    activations = round(saved[0] + slope * (task.micro_batch - SMALL[0]))
    data = sum(tensor.nbytes for tensor in task.dataset().tensors)
    return Predicted(parameters, parameters, optimizer, activations, data)
