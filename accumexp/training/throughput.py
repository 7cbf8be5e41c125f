"""How long the loop has run, and how fast."""

from __future__ import annotations

import time
from dataclasses import replace

from .progress import Progress


class Throughput:
    """Adds the time in the loop to a run's `Progress`, and knows its speed since a mark.

    Its clock runs from when it is made; `go_on` starts it anew after a pause.
    """

    def __init__(self) -> None:
        self._clock = time.perf_counter()
        self._marked = Progress()

    def go_on(self) -> None:
        self._clock = time.perf_counter()

    def tick(self, progress: Progress) -> None:
        """Adds the time since the last call."""
        now = time.perf_counter()
        progress.seconds += now - self._clock
        self._clock = now

    def mark(self, progress: Progress) -> None:
        """Speeds are from here on."""
        self._marked = replace(progress)

    def speeds(self, progress: Progress) -> dict[str, float]:
        """Samples a second and milliseconds an update since the mark, as points of a run."""
        self.tick(progress)
        seconds = max(progress.seconds - self._marked.seconds, 1e-9)
        return {
            "perf/samples_per_second": (progress.samples - self._marked.samples) / seconds,
            "perf/update_ms": 1e3 * seconds / (progress.update - self._marked.update),
        }
