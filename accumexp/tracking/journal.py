"""`metrics.jsonl`: every point of a run on the local disk, whatever becomes of the tracker."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
PROGRESS = "progress.json"
SUMMARY = "summary.json"


class Journal:
    """Appends one JSON object a line: `update`, `time` (seconds since 1970) and the values.

    Args:
        path: the file, kept if it exists.
        upto: drop rows beyond this update, which a resumed run is going to write again.
    """

    def __init__(self, path: Path, upto: int = 0) -> None:
        self.path = path
        if path.exists():
            kept = [row for row in read(path) if row["update"] <= upto]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(partial, path)
        self._file = path.open("a")

    def write(self, update: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"update": update, "time": round(time.time(), 3), **values}) + "\n")

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a journal; a last line cut short by a kill is left out."""
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def write_whole(path: Path, entries: Mapping[str, Any]) -> None:
    """Writes `entries` as JSON in one step, so that a reader never sees half of them."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(entries, indent=2) + "\n")
    os.replace(partial, path)


def read_whole(path: Path) -> dict[str, Any]:
    """What `write_whole` wrote; nothing if there is no such file, or another hand has damaged it."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def last_update(path: Path) -> int:
    """The newest update in a journal, 0 for none."""
    return max((row["update"] for row in read(path)), default=0) if path.exists() else 0


class ProgressFile:
    """`progress.json`: how far a job of a parallel sweep is, for whoever watches it from outside.

    Args:
        every: seconds between two writes; what is said in between is left out.
    """

    def __init__(self, folder: Path, total_updates: int, every: float = 1.0) -> None:
        self.path = folder / PROGRESS
        self.total_updates = total_updates
        self.every = every
        self._values: dict[str, float] = {}
        self._written = 0.0

    def tell(self, update: int, values: Mapping[str, float]) -> None:
        """Takes the newest values, and writes the file if it is time to."""
        self._values.update(values)
        now = time.time()
        if now - self._written < self.every:
            return
        self._written = now
        told = {
            "update": update,
            "total_updates": self.total_updates,
            "values": self._values,
            "time": round(now, 3),
        }
        write_whole(self.path, told)
