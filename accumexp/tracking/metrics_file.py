"""The files of a run's points and progress: `metrics.jsonl` and `progress.json`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import UsageError
from .json_file import write_json, written


class Journal:
    """Appends one JSON object a line: `update`, `time` (seconds since 1970) and the values.

    Args:
        path: the file, kept if it exists.
        upto: rows of later updates are dropped; a resumed run writes them again.
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
        row = json.dumps({"update": update, "time": round(time.time(), 3), **values})
        with written(self.path):
            self._file.write(row + "\n")

    def flush(self) -> None:
        if not self._file.closed:
            with written(self.path):
                self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a journal; a last line cut short by a kill is left out.

    Raises:
        UsageError: naming the line that is damaged.
    """
    if not path.is_file():  # opening a pipe would wait
        raise UsageError(f"{path}: is no file")
    with path.open(errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not _is_row(row):
                raise UsageError(f"{path}: line {number} is damaged; remove it to go on without its points")
            yield row


def _is_row(row: Any) -> TypeGuard[dict[str, Any]]:
    numbers = isinstance(row, dict) and all(isinstance(value, int | float | None) for value in row.values())
    return numbers and isinstance(row.get("update"), int)


def last_update(path: Path) -> int:
    """The newest update in a journal, as far as it can be read; 0 for none."""
    newest = 0
    with suppress(UsageError):
        for row in read(path) if path.exists() else ():
            newest = max(newest, row["update"])
    return newest


@dataclass
class ProgressFile:
    """`progress.json`: the progress of a job of a parallel sweep, for the live view.

    Args:
        every: seconds between two writes; the values in between go into the next one.
    """

    path: Path
    total_updates: int
    every: float = 1.0
    _values: dict[str, float] = field(default_factory=dict)
    _written: float = 0.0

    def write(self, update: int, values: Mapping[str, float]) -> None:
        """Adds the newest values, and writes the file once `every` seconds have passed."""
        self._values.update(values)
        now = time.time()
        if now - self._written < self.every:
            return
        self._written = now
        content = {"update": update, "total_updates": self.total_updates, "values": self._values}
        write_json(self.path, {**content, "time": round(now, 3)})
