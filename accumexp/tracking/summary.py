"""The status of a run and the content of its `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any


class RunStatus(StrEnum):
    """The status of a run, in `summary.json` and in MLflow."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


# Of the fields of a summary: a type, or those of a container and of what it holds.
SUMMARY_TYPES: dict[str, Any] = {
    "status": str,
    "error": str | None,
    "overrides": (list, str),
    "seed": int | None,
    "run_id": str | None,
    "final": (dict, int | float | None),
    "best": (dict, int | float | None),
    "monitored": int | float | None,
    "launch": int,
    "tags": (dict, str),
    "replicas": (list, str),
}


def _is_of(value: Any, kind: Any) -> bool:
    if not isinstance(kind, tuple):
        return isinstance(value, kind)
    container, held = kind
    children = value.values() if isinstance(value, dict) else value
    return isinstance(value, container) and all(isinstance(child, held) for child in children)


@dataclass
class Summary:
    """The content of `summary.json`.

    Attributes:
        error: the reason of a failed run.
        overrides: of a sweep's job, else of the command; of a resumed run those of all its commands.
        final: `final/*` without the prefix, empty until the run has finished.
        best: `final/best_*` without the prefix: the best checkpoint's loss and metrics on the test split.
        monitored: the newest value of the monitored metric.
        launch: the launch of the sweep that ran the job, 0 for the first.
        tags: the tags of the MLflow run that describe how it was computed.
        replicas: of a job of many seeds, the names of its runs' folders.
    """

    status: RunStatus
    error: str | None = None
    overrides: list[str] = field(default_factory=list)
    seed: int | None = None
    run_id: str | None = None
    final: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    monitored: float | None = None
    launch: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    replicas: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> Summary | None:
        """The summary with these entries; None if they have no valid status."""
        if entries.get("status") not in list(RunStatus):
            return None
        values = {item.name: entries[item.name] for item in fields(cls) if item.name in entries}
        if not all(_is_of(value, SUMMARY_TYPES[name]) for name, value in values.items()):
            return None
        return cls(**{**values, "status": RunStatus(entries["status"])})

    @property
    def finished(self) -> bool:
        return self.status is RunStatus.FINISHED
