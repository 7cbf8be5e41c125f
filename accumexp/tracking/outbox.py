"""`unsent.jsonl`: what a run has not sent to its store yet, in order, one JSON object a line."""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .json_file import written

# A file of which all is sent is emptied once it has this many bytes.
LARGEST_SENT = 2**20

# One of {"points": [[key, value, milliseconds since 1970, step], ...]}, {"tags": {name: value}},
# {"file": path in the run's folder, "folder": artifact folder or null}, {"model": name, ...},
# {"stale models": [name, ...]} and {"status": status, "time": milliseconds since 1970}.
Entry = dict[str, Any]
KINDS = {"points": list, "tags": dict, "file": str, "model": str, "stale models": list, "status": str}


class Outbox:
    """A queue in a file: one thread adds entries, another takes them. Memory does not grow with the queue.

    Args:
        path: the file, which is written anew; None for one without a name.
        identity: the store, experiment and run; the file's first line, so that others can send the rest.
        entries: what an earlier process left.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any], entries: Iterable[Entry] = ()) -> None:
        self.path = path
        self._identity = identity
        self._lock = threading.Lock()
        if path is None:
            self._file: Any = tempfile.TemporaryFile("a+b")  # noqa: SIM115
            self._begin()
        else:
            _write(path, [identity, *entries])
            self._file = path.open("a+b")
            self._size = self._file.seek(0, os.SEEK_END)
        self._sent = len(_line(identity))  # the offset of the first entry that is not sent

    def _begin(self) -> None:
        self._file.truncate(0)
        self._size = self._sent = self._file.write(_line(self._identity))

    def add(self, entry: Entry) -> None:
        """Adds an entry, unless the outbox is closed."""
        with self._lock, written(self.path or Path("a temporary file")):
            if not self._file.closed:
                self._size += self._file.write(_line(entry))

    def flush(self) -> None:
        """Makes what was added survive the end of this process."""
        with self._lock, written(self.path or Path("a temporary file")):
            if not self._file.closed:
                self._file.flush()

    def take(self, most: int | None = None) -> tuple[list[Entry], list[int]]:
        """The oldest entries, at most `most`, and for each the argument of `sent` once it is sent."""
        with self._lock:
            self._file.flush()
            self._file.seek(self._sent)
            lines = list(itertools.islice(self._file, most))
        ends = itertools.accumulate(map(len, lines), initial=self._sent)
        return [json.loads(line) for line in lines], list(ends)[1:]

    def sent(self, upto: int, empties: bool = True) -> None:
        """Drops the entries before `upto`; a long file of which all is sent is emptied if `empties`."""
        with self._lock:
            self._sent = upto
            if empties and self._sent == self._size > LARGEST_SENT and not self._file.closed:
                self._begin()

    def close(self, unsent: Sequence[Entry]) -> None:
        """Leaves `unsent` in the file, which is removed if that is nothing."""
        with self._lock:
            self._file.close()
        if self.path is None:
            return
        if unsent:
            _write(self.path, [self._identity, *unsent])
        else:
            self.path.unlink(missing_ok=True)


def read_unsent(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """The identity and the entries of a run's `unsent.jsonl`, which may be sent already.

    A last line cut short by a kill is left out. Both are empty if there is no such file.

    Raises:
        UsageError: if the file is damaged, or names a file outside of its folder.
    """
    if not path.is_file():  # opening a pipe would wait
        return {}, []
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    try:
        identity, *entries = [json.loads(line) for line in lines] or [{}]
        texts = all(isinstance(identity[key], str) for key in ("uri", "experiment_id", "run_id") if lines)
        damaged = not texts or not all(map(_is_entry, entries))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        identity, entries, damaged = {}, [], True
    if damaged:
        raise UsageError(f"{path}: is damaged; remove it to go on without what it holds")
    folder = path.parent.resolve()
    for name in (entry[key] for entry in entries for key in ("file", "weights", "inputs") if entry.get(key)):
        if not (folder / name).resolve().is_relative_to(folder):
            raise UsageError(f"{path}: names {name}, which is outside of the run's folder")
    return identity, entries


def _is_entry(entry: Any) -> bool:
    return any(isinstance(entry.get(key), kind) for key, kind in KINDS.items())


def _write(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(b"".join(map(_line, entries)))
    os.replace(partial, path)


def _line(entry: Mapping[str, Any]) -> bytes:
    return (json.dumps(entry) + "\n").encode()


def described(entries: Iterable[Entry]) -> str:
    """What kinds of entries there are, and how many of each."""
    entries = list(entries)
    counts = {
        "points": sum(len(entry.get("points", ())) for entry in entries),
        "tags": sum(len(entry.get("tags", ())) for entry in entries),
        "files": sum("file" in entry for entry in entries),
        "logged models": sum("model" in entry for entry in entries),
    }
    parts = [f"{count} {name}" for name, count in counts.items() if count]
    if any("status" in entry for entry in entries):
        parts.append("the end")
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)
