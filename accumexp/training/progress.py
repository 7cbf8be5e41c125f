"""How far a run is, how long it is, and where its points go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class MetricsSink(Protocol):
    """Where points go."""

    def record(self, update: int, values: Mapping[str, float], publish: bool) -> None:
        """Keeps `values` of `update`; with `publish`, the tracker gets them too."""
        ...


@dataclass
class Progress:
    """How far a run is. All counts are of finished things.

    Attributes:
        epoch: epochs, and with it the one that the next update belongs to.
        update: updates since the run began.
        epoch_update: updates in the present epoch.
        samples: samples seen.
        seconds: time spent in the loop, without evaluation and checkpoints.
        activation_bytes: peak bytes saved for backward in the window that was measured, the first one or the
            first of a finer split; 0 before it.
    """

    epoch: int = 0
    update: int = 0
    epoch_update: int = 0
    samples: int = 0
    seconds: float = 0.0
    activation_bytes: int = 0


def total_updates(updates_per_epoch: int, epochs: int, max_updates: int | None) -> int:
    """Updates in a run."""
    every = updates_per_epoch * epochs
    return every if max_updates is None else min(every, max_updates)


def updates_between_reads(updates: int) -> int:
    """`log_every` of a run of `updates`, where nobody chose: enough points for a curve, at little cost."""
    return max(10, min(100, updates // 100))
