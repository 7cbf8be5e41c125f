"""Several processes at once: on one run, in one folder, in one new store."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.command import environment, journal, records, run_command
from tests.support.launched import until
from tests.support.same_run import doubled

SMALL = ["model=mlp", "device=cpu", "data.batch_size=512"]
SLOW = [
    "+callbacks.slow._target_=tests.support.odd_parts.Slow",
    *("trainer.max_updates=40", "trainer.epochs=100"),
]


@dataclass(frozen=True)
class Answer:
    """What was tried, whether it went as it should, and its last line or result."""

    what: str
    good: bool
    last_line: str


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "accumexp.run", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def on_one_run(folder: Path) -> list[Answer]:
    """A `resume=` and a new run beside a living run, and then two `resume=` at once."""
    folder.mkdir(parents=True)
    (folder / "slow").touch()
    slow = [*SLOW, f"+callbacks.slow.mark={folder / 'slow'}"]
    living = _start(folder, *SMALL, *slow, "hydra.run.dir=run")
    until(lambda: any((folder / "run" / "checkpoints").glob("update-*.pt")))
    answers = []
    for what, arguments in (
        ("resume= beside the living run", ["resume=run", "trust=[tests]"]),
        ("a new run in the folder of a living one", [*SMALL, "hydra.run.dir=run"]),
    ):
        done = run_command("run", *arguments, folder=folder)
        answers.append(Answer(what, done.code == 2 and done.stderr.count("\n") == 1, done.stderr.strip()))
    living.kill()
    living.communicate()
    both = [_start(folder, "resume=run", "trust=[tests]") for _ in range(2)]
    until(lambda: any(process.poll() is not None for process in both))
    (folder / "slow").unlink()
    last_lines = [process.communicate()[0].splitlines()[-1] for process in both]
    codes = [process.returncode for process in both]
    refused = last_lines[codes.index(2)] if 2 in codes else ""
    answers.append(Answer("two resume= at once", sorted(codes) == [0, 2], refused))
    (record,) = records(folder)
    updates = [row["update"] for row in journal(folder / "run") if "train/loss" in row]
    complete = updates == list(range(1, 41)) and not doubled(record) and record.status == "FINISHED"
    answers.append(Answer("the run after all of them", complete, f"{len(updates)} updates, {record.status}"))
    done = run_command("run", *SMALL, "hydra.run.dir=run", folder=folder)
    answers.append(Answer("a new run in its folder", done.code == 2, done.stderr.strip()))
    return answers


def in_one_store(folder: Path, count: int) -> Answer:
    """`count` runs that are started at once, whose store is new."""
    processes = [
        _start(folder, *SMALL, "trainer.max_updates=5", f"seed={seed}", f"hydra.run.dir=run{seed}")
        for seed in range(count)
    ]
    outputs = [process.communicate()[0] for process in processes]
    runs = records(folder)
    good = all(process.returncode == 0 for process in processes) and len(runs) == count
    good = good and all(record.status == "FINISHED" and not doubled(record) for record in runs)
    points = {len(record.points["train/loss"]) for record in runs}
    counts = f"{len(runs)} runs, {sorted(points)} points of train/loss each"
    return Answer(
        f"{count} runs at once in a new store", good and points == {5}, counts if good else outputs[0]
    )
