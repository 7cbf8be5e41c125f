"""Runs whose disk fills up, and their resume once there is room again. Mounts file systems, as root."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.command import only_run, run_command
from tests.support.same_run import differences, rows, state

SETTINGS = [
    *("model=mlp", "device=cpu", "optimizer=adamw", "accum.steps=3", "trainer.epochs=4"),
    *("callbacks.checkpoint.every_updates=5", "callbacks.checkpoint.keep_last=100", "tracking=none"),
]


@dataclass(frozen=True)
class Full:
    """A run on a disk of `mebibytes`, resumed when the disk has grown.

    Attributes:
        code: exit code of the run on the full disk.
        lines: its lines on stderr.
        same: whether the resumed run has the bits of one that had room.
    """

    mebibytes: float
    code: int
    lines: list[str]
    same: bool

    @property
    def good(self) -> bool:
        error = [line for line in self.lines if line.startswith("error: ")]
        return self.code == 1 and len(error) == 1 and "Traceback" not in "".join(self.lines) and self.same


def full_disks(folder: Path, sizes: list[float]) -> list[Full]:
    """One run for each size of disk, too small for all its checkpoints."""
    reference = folder / "reference"
    done = run_command("run", *SETTINGS, folder=reference)
    assert done.code == 0, done
    return [_full(folder / f"disk-{size}", size, only_run(reference)) for size in sizes]


def _full(folder: Path, mebibytes: float, never_full: Path) -> Full:
    with _disk(folder, mebibytes):
        done = run_command("run", *SETTINGS, folder=folder)
        subprocess.run(["mount", "-o", "remount,size=100m", str(folder)], check=True)
        run = only_run(folder)
        again = run_command("run", f"resume={run}", folder=folder)
        same = (
            again.code == 0
            and not differences(state(run), state(never_full))
            and rows(run) == rows(never_full)
        )
    return Full(mebibytes, done.code, done.stderr.splitlines(), same)


@contextlib.contextmanager
def _disk(folder: Path, mebibytes: float) -> Iterator[None]:
    folder.mkdir(parents=True)
    size = f"size={int(mebibytes * 1024)}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
