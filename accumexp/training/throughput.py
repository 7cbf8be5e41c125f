"""What a run costs: its time, its speed, and its memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..accum import Window, measure_activations, tensors
from ..accum.sync import plain
from ..data import Batch
from .progress import Progress


class Throughput:
    """Adds the time in the loop to a run's `Progress`, and measures the speed since a mark.

    The clock starts when the object is made; `resume` restarts it after a pause.
    """

    def __init__(self) -> None:
        self._clock = time.perf_counter()
        self._marked = Progress()

    def resume(self) -> None:
        self._clock = time.perf_counter()

    def tick(self, progress: Progress) -> None:
        """Adds the time since the last call."""
        now = time.perf_counter()
        progress.seconds += now - self._clock
        self._clock = now

    def mark(self, progress: Progress) -> None:
        """Sets the beginning of the next speeds."""
        self._marked = replace(progress)

    def speeds(self, progress: Progress) -> dict[str, float]:
        """Samples a second and milliseconds an update since the mark, by metric key."""
        self.tick(progress)
        seconds = max(progress.seconds - self._marked.seconds, 1e-9)
        return {
            "perf/samples_per_second": (progress.samples - self._marked.samples) / seconds,
            "perf/update_ms": 1e3 * seconds / (progress.update - self._marked.update),
        }


class ActivationMeter:
    """Measures the bytes that a window saves for backward.

    Attributes:
        due: whether the next window is measured, as the first one is.
    """

    def __init__(self) -> None:
        self.due = True
        self._new = False

    @contextmanager
    def measure(self, window: Window, batch: Batch, progress: Progress) -> Iterator[bool]:
        """Measures `window` on `batch` into `progress`, if it is due; yields whether it is."""
        if not self.due:
            yield False
            return
        given = [*tensors(batch.inputs), *tensors(batch.targets)]
        with measure_activations(window.model, given) as saved:
            window.on_discard.append(saved.start_anew)
            yield True
            window.on_discard.remove(saved.start_anew)
        progress.activation_bytes = saved.peak_bytes
        self.due, self._new = False, True

    def take_new(self) -> bool:
        """Whether a window was measured since the last call."""
        new, self._new = self._new, False
        return new


def peak_bytes(window: Window, optimizer: Any, progress: Progress) -> int:
    """Bytes of tensors on this rank's device at their peak.

    On a GPU what torch's allocator has counted since the start of the run, with the temporary memory of
    operators and with the data that lies there. On a CPU, where torch does not count: weights, buffers, the
    gradients of a whole window, the optimizer's state, and the activations of a micro-batch.
    """
    parameters = list(window.model.parameters())
    device = parameters[0].device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    states = [state for state in getattr(optimizer, "state", {}).values() if isinstance(state, Mapping)]
    values = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    held = [*parameters, *window.model.buffers(), *values]
    held += [parameter for parameter in parameters if parameter.requires_grad]  # as large as their gradients
    return sum(plain(tensor).nbytes for tensor in held) + progress.activation_bytes
