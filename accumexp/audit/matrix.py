"""Trainers x settings: every installed trainer audited in a process of its own, and the page about it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import UsageError, markdown_text
from .cells import UNDECIDED, Cell, from_json
from .trainers import trainer_names

MARKS = {"equal": "equal", "not equal": "**differs**", UNDECIDED: "not audited"}
NOTHING = "–"


def all_trainers(arguments: Sequence[str]) -> Iterator[tuple[str, list[Cell] | str]]:
    """Audits every trainer of the project, as many at a time as there are cores.

    A process of its own keeps a trainer's patches of torch from the next one.

    Args:
        arguments: of the command line, for each of the processes.

    Yields:
        (name, cells) of each trainer as it ends, or (name, the line that says why it was not audited).
    """
    with TemporaryDirectory(prefix="accumexp-audit-") as folder, ThreadPoolExecutor(_processes()) as pool:
        jobs = {pool.submit(_audited, name, arguments, Path(folder)): name for name in trainer_names()}
        for job in as_completed(jobs):
            yield jobs[job], job.result()


def _processes() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _audited(name: str, arguments: Sequence[str], folder: Path) -> list[Cell] | str:
    path = folder / f"{name}.json"
    command = [sys.executable, "-m", "accumexp.audit", name, *arguments, "--json", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # the cores are shared
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if path.exists():
        return from_json(path.read_text())
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    raise UsageError(f"{name}: ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}")


def markdown(cells: Sequence[Cell], left_out: Sequence[str], command: str) -> str:
    """The page of a matrix.

    Args:
        left_out: why trainers are not in it, a line each.
        command: the command line that makes the page.
    """
    trainers = list(dict.fromkeys(cell.trainer for cell in cells))
    settings = list(dict.fromkeys(cell.setting for cell in cells))
    by_place = {(cell.trainer, cell.setting): cell for cell in cells}
    versions = {cell.trainer: f"{cell.package} {cell.version}" for cell in cells}
    import torch

    counts = {verdict: sum(cell.verdict == verdict for cell in cells) for verdict in MARKS}
    totals = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    lines = [
        "# Audit of trainers",
        "",
        "Is a trainer's gradient accumulation the larger batch? Each cell trains a small model with this",
        "trainer twice, unmodified: with 4 micro-batches of 8 samples an update, and with one of 32. All",
        "updates are compared, each from the same weights. [proof.md](proof.md#audit) says how, and what an",
        "audit cannot see.",
        "",
        f"Made on {date.today().isoformat()} by `{command}`, with torch {torch.__version__} and Python",
        f"{platform.python_version()}, on a CPU: {totals}. `accumexp/audit/conf/setting/` has the settings.",
        "",
        "| setting | " + " | ".join(versions[trainer] for trainer in trainers) + " |",
        "|---" * (len(trainers) + 1) + "|",
    ]
    for setting in settings:
        row = [by_place.get((trainer, setting)) for trainer in trainers]
        lines.append(f"| {setting} | " + " | ".join(MARKS[c.verdict] if c else NOTHING for c in row) + " |")
    lines += [
        "",
        f"{NOTHING}: the trainer has no such setting, for a reason that its adapter's docstring names.",
        "",
    ]
    lines += ["## What differs", "", *_differences(cells)]
    named = [cell for cell in cells if cell.equal and cell.lines]
    if named:
        lines += ["", "## Equal, up to a source that is named", "", *_grouped(named)]
    undecided = [cell for cell in cells if cell.verdict == UNDECIDED]
    if undecided or left_out:
        lines += [
            "",
            "## Not audited",
            "",
            *_grouped(undecided),
            *(f"- {markdown_text(line)}" for line in left_out),
        ]
    return "\n".join(lines) + "\n"


def _differences(cells: Sequence[Cell]) -> list[str]:
    different = [cell for cell in cells if cell.verdict == "not equal"]
    return _grouped(different) or ["Nothing."]


def _grouped(cells: Sequence[Cell]) -> list[str]:
    """One entry for the cells of a trainer that say the same."""
    groups: dict[tuple[str, str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.trainer, "; ".join(cell.lines), " ".join(cell.advice)].append(cell)
    entries = []
    for (trainer, text, advice), members in groups.items():
        names = ", ".join(cell.setting for cell in members)
        entry = f"- **{trainer}**, {names}: {markdown_text(text)}."
        entries.append(entry + (f" *To do:* {markdown_text(advice)}." if advice else ""))
    return entries


def write(cells: Sequence[Cell], left_out: Sequence[str], command: str, page: Path) -> None:
    """Writes the page, and the cells as JSON beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(markdown(cells, left_out, command), encoding="utf-8")
    page.with_suffix(".json").write_text(json.dumps([cell.__dict__ for cell in cells], indent=1) + "\n")
