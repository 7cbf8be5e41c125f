"""Trainers x settings: every installed trainer audited in a process of its own, and the page about it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import UsageError, markdown_text
from .cells import CONF, UNDECIDED, Cell, as_json, from_json
from .settings import GENERAL
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
    settings = sorted({cell.setting for cell in cells}, key=_rank)
    by_place = {(cell.trainer, cell.setting): cell for cell in cells}
    versions = {cell.trainer: f"{cell.package} {cell.version}" for cell in cells}
    packages = ", ".join(f"{name} ({versions[name]})" for name in trainers)
    import torch

    counts = {verdict: sum(cell.verdict == verdict for cell in cells) for verdict in MARKS}
    totals = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    lines = [
        "# Audit of trainers",
        "",
        "Is a trainer's gradient accumulation the larger batch? Each cell trains a small model with this",
        "trainer twice, unmodified: with 4 micro-batches of 8 samples an update, and with one of 32. All",
        "updates are compared, each from the same weights.",
        "[proof.md](proof.md#a-trainer-that-is-not-yours) says how, and what an audit cannot see.",
        "",
        f"Made on {date.today().isoformat()} by `{command}`, with torch {torch.__version__} and Python",
        f"{platform.python_version()}, on a CPU: {totals}. The trainers: {packages}.",
        "",
        "In a checkout, `python -m tests.audit.truth --against docs/audit.json` compares the cells with",
        "plain PyTorch that shares no code with the audit. `python -m benchmarks.audit_history` audits",
        "releases before and after faults were mended:",
        "[benchmarks/README.md](../benchmarks/README.md#faults-of-the-past).",
        "",
        "| setting | what is trained | " + " | ".join(trainers) + " |",
        "|---" * (len(trainers) + 2) + "|",
    ]
    for setting in settings:
        row = [by_place.get((trainer, setting)) for trainer in trainers]
        marks = [MARKS[cell.verdict] if cell else NOTHING for cell in row]
        lines.append(f"| {setting} | {described(setting)} | {' | '.join(marks)} |")
    lines += ["", f"{NOTHING}: the trainer has no such setting; its adapter's docstring says why.", ""]
    lines += ["## What differs", "", *(_grouped(cells, "not equal") or ["Nothing."])]
    undecided = _grouped(cells, UNDECIDED)
    if undecided or left_out:
        lines += ["", "## Not audited", "", *undecided]
        lines += [f"- {markdown_text(line)}" for line in left_out]
    return "\n".join(lines) + "\n"


def _rank(setting: str) -> tuple[int, str]:
    return (GENERAL.index(setting) if setting in GENERAL else len(GENERAL), setting)


def described(setting: str) -> str:
    """The first line of a setting's file, without its full stop."""
    path = CONF / "setting" / f"{setting}.yaml"
    return path.read_text().splitlines()[0].removeprefix("# ").rstrip(".") if path.exists() else ""


def _grouped(cells: Sequence[Cell], verdict: str) -> list[str]:
    """An entry for each setting and kind of difference, with the trainers that have it and what to do."""
    groups: dict[tuple[str, str], list[Cell]] = defaultdict(list)
    for cell in sorted(cells, key=lambda cell: _rank(cell.setting)):
        if cell.verdict == verdict:
            # Trainers that round otherwise differ in the last digits.
            rounded = re.sub(r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.4g}", "; ".join(cell.lines))
            groups[cell.setting, rounded].append(cell)
    entries = []
    for (setting, text), members in groups.items():
        names = ", ".join(cell.trainer for cell in members)
        entries.append(f"- {setting}, **{names}**: {markdown_text(text)}.")
        entries += [f"  - {c.trainer}: {'; '.join(c.advice)}." for c in members if c.advice]
    return entries


def write(cells: Sequence[Cell], left_out: Sequence[str], command: str, page: Path) -> None:
    """Writes the page, and the cells as JSON beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(markdown(cells, left_out, command), encoding="utf-8")
    page.with_suffix(".json").write_text(as_json(cells))
