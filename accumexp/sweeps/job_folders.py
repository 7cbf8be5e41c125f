"""Which folder a job of a sweep works in: `<number>_<overrides>`, the one it had before if it had one.

Every launch of a sweep, the first and those that go on with it, numbers its jobs from 0 on its own. What
makes a job the same in two launches is the set of its overrides, so `jobs.jsonl` in the sweep's folder keeps,
a line a job and launch, which overrides work in which folder; `launches.json` keeps what each launch
asked for.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import UsageError
from ..tracking.journal import write_whole

# What Hydra or an earlier `sweep.resume=` has added to a sweep's own overrides.
LAUNCH = "hydra.callbacks.sweep.launch"
ADDED = {"hydra.mode", "hydra.sweep.dir", LAUNCH}
SWEEPER = ("hydra.sweeper", "hydra/sweeper")
REPORT = "report."
MULTIRUN = {"-m", "--multirun"}
PLACES = "jobs.jsonl"
LAUNCHES = "launches.json"
LOCK = ".jobs.lock"


@dataclass(frozen=True)
class JobFolder:
    """The folder's name that job `number` of a launch has for its overrides, and since when."""

    launch: int
    number: int
    overrides: list[str]
    folder: str
    time: float


@dataclass(frozen=True)
class Launch:
    """The command line of a launch, and the overrides that it came to: of the task, and of Hydra."""

    command: str
    task: list[str]
    hydra: list[str]


def place(sweep: str | Path, launch: int, number: int, name: str, overrides: Sequence[str]) -> str:
    """The name of the folder for job `number` of launch `launch`; asked again, it says the same.

    A folder that another launch gave to the same overrides is taken over, the one with the same number
    first if there are several. Else it is a new one, `<number>_<name>`, with a number that no other has.
    """
    root = Path(sweep)
    with FileLock(root / LOCK, timeout=120):
        known = places(root)
        same = _identity(overrides)
        alike = [one for one in known if _identity(one.overrides) == same]
        for one in alike:
            if (one.launch, one.number) == (launch, number):
                return one.folder
        taken = {one.folder for one in known if one.launch == launch}
        before = [one for one in alike if one.folder not in taken]
        if before:
            folder = min(before, key=lambda one: one.number != number).folder
        else:
            numbers = {number_of(one.folder) for one in known}
            folder = f"{number if number not in numbers else max(numbers) + 1}_{name}"
        _append(root / PLACES, JobFolder(launch, number, list(overrides), folder, round(time.time(), 3)))
        return folder


def slug(text: str) -> str:
    """`text` as one folder name: no separators, 120 characters at most."""
    return re.sub(r"[^\w.,=+-]+", "_", text).strip("._")[:120] or "job"


def places(sweep: Path) -> list[JobFolder]:
    """All places of a sweep, oldest first; a line cut short by a kill is left out."""
    path = sweep / PLACES
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(JobFolder(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def number_of(folder: str | Path) -> int:
    """The number that a job's folder begins with."""
    return int(Path(folder).name.partition("_")[0])


def begin_launch(sweep: Path, launch: Launch) -> int:
    """The number of a launch that begins now, which no other has: 0 for a sweep's first.

    Notes the launch, and the places of an earlier one that has not noted them itself.

    Raises:
        UsageError: if the list of launches is damaged.
    """
    sweep.mkdir(parents=True, exist_ok=True)
    with FileLock(sweep / LOCK, timeout=120):
        noted = launches(sweep)
        for summary in [] if (sweep / PLACES).exists() else sweep.glob("[0-9]*_*/summary.json"):
            overrides = json.loads(summary.read_text())["overrides"]
            folder = summary.parent.name
            _append(
                sweep / PLACES, JobFolder(0, number_of(folder), overrides, folder, summary.stat().st_mtime)
            )
        number = 1 + max([*noted, *(one.launch for one in places(sweep))], default=-1)
        written = {str(key): asdict(value) for key, value in {**noted, number: launch}.items()}
        write_whole(sweep / LAUNCHES, written)
        return number


def launches(sweep: Path) -> dict[int, Launch]:
    """The launches of a sweep by their number, also those of which no job came to be.

    Raises:
        UsageError: if the list of them is damaged.
    """
    path = sweep / LAUNCHES
    if not path.exists():
        return {}
    try:
        return {int(number): Launch(**entry) for number, entry in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError):
        raise UsageError(f"{path}: is damaged; if removed, multirun.yaml counts in its place") from None


def asked_for(sweep: Path) -> list[Launch]:
    """What the launches of a sweep asked for, oldest first, the same jobs once, in the newest words.

    A launch of which no job came to be counts for nothing.
    """
    came = {one.launch for one in places(sweep)}
    found: dict[tuple[str, ...], Launch] = {}
    for number, launch in sorted(launches(sweep).items()):
        if number in came:
            sweeper = [word for word in launch.hydra if word.lstrip("+~").startswith(SWEEPER)]
            found[tuple([*_identity(launch.task), *sweeper])] = launch
    return list(found.values())


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


def command_line(arguments: Sequence[str], command: str = "run") -> str:
    """The command that has these arguments, to be typed again."""
    return shlex.join(["python", "-m", f"accumexp.{command}", *arguments])


def _identity(overrides: Sequence[str]) -> list[str]:
    """What makes a job the same as another; how the sweep is reported on is no part of it."""
    return sorted(one for one in overrides if not one.lstrip("+~").startswith(REPORT))


def _append(path: Path, entry: Any) -> None:
    cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(asdict(entry)) + "\n")
