"""What a run costs: its time, its speed, and the activations of a window."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..accum import Window, measure_activations, tensors
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
