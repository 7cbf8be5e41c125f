"""Where a trainer's points go: the protocol, and the sinks that need neither a folder nor a tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class MetricsSink(Protocol):
    """Receives the points of a run."""

    def record(self, update: int, values: Mapping[str, float], publish: bool) -> None:
        """Keeps `values` of `update`; with `publish`, the tracker gets them too."""
        ...


class NullMetricsSink:
    """Keeps nothing."""

    def record(self, update: int, values: Mapping[str, float], publish: bool) -> None: ...


class MemoryMetricsSink:
    """Keeps every point in memory.

    Attributes:
        rows: update, values, and whether they were published, in the order of arrival.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float], bool]] = []

    def record(self, update: int, values: Mapping[str, float], publish: bool) -> None:
        self.rows.append((update, dict(values), publish))

    def series(self, key: str) -> list[tuple[int, float]]:
        """The updates and values of one metric."""
        return [(update, values[key]) for update, values, _ in self.rows if key in values]
