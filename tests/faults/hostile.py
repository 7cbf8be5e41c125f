"""Both commands that read a checkpoint, over every hostile and damaged one."""

from __future__ import annotations

from pathlib import Path

from accumexp.training.checkpoint import find, load
from tests.support.command import only_run, run_command
from tests.support.hostile import cases, faults, run_hostile

COMMANDS = ("evaluate", "run")
SOUND = ["model=mlp", "callbacks=ema", "tracking=none", "device=cpu", "trainer.max_updates=13"]


def hostile_checkpoints(folder: Path) -> tuple[int, float, list[str]]:
    """The number of commands that were run, the most GiB that one took, and what went wrong in which."""
    done = run_command("run", *SOUND, folder=folder / "sound")
    assert done.code == 0, done
    content = load(find(only_run(folder / "sound")))
    count, most, wrong = 0, 0.0, []
    for case in cases():
        for command in COMMANDS:
            done, grown, ran = run_hostile(command, case, content, folder / "case")
            count, most = count + 1, max(most, grown)
            wrong += [f"{case.name}, {command}: {fault}" for fault in faults(done, grown, ran)]
    return count, most, wrong
