"""JSON files that several processes write and read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import TrainingError


@contextmanager
def written(path: Path) -> Iterator[None]:
    """
    Raises:
        TrainingError: in place of an OSError, naming the file that cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_json(path: Path, entries: Mapping[str, Any]) -> None:
    """Writes `entries` as JSON in one step, so that a reader never sees half of them."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(entries, indent=2) + "\n")
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; empty if there is no such file, or it is damaged."""
    if not path.is_file():  # opening a pipe would wait
        return {}
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}
