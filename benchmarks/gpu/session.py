"""What a part of `benchmarks.gpu` works with, and the report it leaves."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Session:
    """One part: its settings, and its figures, which are written as they come.

    Attributes:
        folder: where the part works; it is removed afterwards, but for the report.
        figures: of the JSON report.
        lines: of the table.
        problems: why the part has failed, if it has.
    """

    device: str
    quick: bool
    folder: Path
    data_root: Path | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, figures: Any, *lines: str) -> None:
        """Adds figures and what the table shows of them; a part that is ended later has reported them."""
        self.figures[name] = figures
        self.lines += lines
        self.write()

    def write(self) -> None:
        path = self.folder / "part.json"
        part = path.with_suffix(".new")
        part.write_text(json.dumps({"figures": self.figures, "lines": self.lines, "problems": self.problems}))
        part.replace(path)

    def fail(self, problem: str) -> None:
        """Marks the part as failed; it goes on."""
        print(f"problem: {problem}", flush=True)
        self.problems.append(problem)
        self.write()

    @contextlib.contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """Reports an exception as a problem of `name`, and goes on after it."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self.fail(f"{name}: {type(error).__name__}: {reason}")
