"""Which folder a job of a sweep works in: `<number>_<overrides>`, the one it had before if it had one.

Every launch of a sweep, the first and those that go on with it, numbers its jobs from 0 on its own. What
makes a job the same in two launches is the set of its overrides, so `jobs.jsonl` in the sweep's folder keeps,
a line a job and launch, which overrides work in which folder.
"""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

# What Hydra or an earlier `sweep.resume=` has added to a sweep's own overrides.
ADDED = {"hydra.mode", "hydra.sweep.dir", "hydra.callbacks.sweep.launch"}
PLACES = "jobs.jsonl"
LAUNCHES = "launches.json"


@dataclass(frozen=True)
class Place:
    """The folder's name that job `number` of a launch has for its overrides, and since when."""

    launch: int
    number: int
    overrides: list[str]
    folder: str
    time: float


def place(sweep: str | Path, launch: int, number: int, name: str, overrides: Sequence[str]) -> str:
    """The name of the folder for job `number` of launch `launch`; asked again, it says the same.

    A folder that another launch gave to the same overrides is taken over, the one with the same number
    first if there are several. Else it is a new one, `<number>_<name>`, with a number that no other has.
    """
    root = Path(sweep)
    with FileLock(root / ".jobs.lock", timeout=120):
        known = places(root)
        mine = {one.number: one for one in known if one.launch == launch}
        if number in mine:
            return mine[number].folder
        taken = {one.folder for one in mine.values()}
        same = sorted(overrides)
        before = [one for one in known if sorted(one.overrides) == same and one.folder not in taken]
        if before:
            folder = min(before, key=lambda one: one.number != number).folder
        else:
            numbers = {number_of(one.folder) for one in known}
            folder = f"{number if number not in numbers else max(numbers) + 1}_{name}"
        _append(root / PLACES, Place(launch, number, list(overrides), folder, round(time.time(), 3)))
        return folder


def places(sweep: Path) -> list[Place]:
    """All places of a sweep, oldest first; a line cut short by a kill is left out."""
    path = sweep / PLACES
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(Place(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def number_of(folder: str | Path) -> int:
    """The number that a job's folder begins with."""
    return int(Path(folder).name.partition("_")[0])


def begin_launch(sweep: Path, launch: int, command: str) -> None:
    """Notes the command that goes on with a sweep, and the places of one that has not noted them itself."""
    with FileLock(sweep / ".jobs.lock", timeout=120):
        commands = launches(sweep)
        (sweep / LAUNCHES).write_text(json.dumps({**commands, str(launch): command}, indent=2) + "\n")
        if (sweep / PLACES).exists():
            return
        for summary in sweep.glob("[0-9]*_*/summary.json"):
            overrides = json.loads(summary.read_text())["overrides"]
            folder = summary.parent.name
            _append(sweep / PLACES, Place(0, number_of(folder), overrides, folder, summary.stat().st_mtime))


def launches(sweep: Path) -> dict[str, str]:
    """The commands that went on with a sweep, by the number of the launch."""
    path = sweep / LAUNCHES
    return json.loads(path.read_text()) if path.exists() else {}


def next_launch(sweep: Path) -> int:
    """The number of the launch that is about to go on with a sweep: 1 for the first that does."""
    return 1 + max((int(number) for number in launches(sweep)), default=0)


def counted(sweeper: Any, overrides: Sequence[str]) -> tuple[int | None, list[str]]:
    """(How many jobs Hydra's own sweeper makes of a multirun's overrides, the keys that vary over them).

    Another sweeper decides on its way, and a glob needs all of the configuration: (None, nothing known).
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not str(sweeper.get("_target_", "")).endswith(".BasicSweeper"):
        return None, []
    lines = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    values: dict[str, int] = {}
    try:
        # The last word for a key is the one that counts.
        for override in OverridesParser.create().parse_overrides([*lines, *overrides]):
            several = list(override.sweep_string_iterator()) if override.is_sweep_override() else [None]
            values[override.get_key_element()] = len(several)
    except HydraException:
        return None, []
    return math.prod(values.values()), [key.lstrip("+") for key, count in values.items() if count > 1]


def parallel(launcher: Any) -> bool:
    """Whether a launcher may run several jobs at a time: any but Hydra's own."""
    return not str(launcher.get("_target_", "")).endswith(".BasicLauncher")


def begun(sweep: Path, launch: int) -> bool:
    """Whether a job of this launch has come to be; a bad command line changes nothing in an old sweep."""
    return not launch or any(one.launch == launch for one in places(sweep))


def command_line(arguments: Sequence[str]) -> str:
    """The command that has these arguments, to be typed again."""
    return shlex.join(["python", "-m", "accumexp.run", *arguments])


def _append(path: Path, entry: Any) -> None:
    cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(asdict(entry)) + "\n")
