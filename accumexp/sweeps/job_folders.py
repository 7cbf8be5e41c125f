"""The folders of a sweep's jobs: `<number>_<overrides>`, the same folder for the same job in every launch.

Every launch of a sweep, the first and those that resume it, numbers its jobs from 0. A job is identified over
launches by the set of its overrides: `jobs.jsonl` in the sweep's folder keeps, a line a job and launch,
which overrides belong to which folder; `launches.json` keeps the command line of each launch.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import UsageError
from ..tracking.json_file import write_json
from ..tracking.run_folder import RunFolder
from ..tracking.yaml_file import read_text
from .hydra_sweep import file_flags

SWEEPER = ("hydra.sweeper", "hydra/sweeper")
REPORT = "report."
JOBS = "jobs.jsonl"
LAUNCHES = "launches.json"
LOCK = ".jobs.lock"


@dataclass(frozen=True)
class JobFolder:
    """The name of the folder that job `number` of a launch has for its overrides.

    Attributes:
        time: when the job was given the folder, in seconds since 1970.
    """

    launch: int
    number: int
    overrides: list[str]
    folder: str
    time: float


@dataclass(frozen=True)
class Launch:
    """The command line of a launch, and its overrides: of the task, and of Hydra.

    Attributes:
        files: the flags that choose the files the launch is composed from, see `hydra_sweep.file_flags`.
    """

    command: str
    task: list[str]
    hydra: list[str]
    files: list[str] = field(default_factory=list)


def job_folder_name(sweep: str | Path, launch: int, number: int, name: str, overrides: Sequence[str]) -> str:
    """The name of the folder for job `number` of launch `launch`. Calling it again gives the same name.

    A folder that another launch gave to the same overrides is used again, the one with the same number
    first if there are several. Otherwise it is a new one, `<number>_<name>`, with an unused number.
    """
    root = Path(sweep)
    with FileLock(root / LOCK, timeout=120):
        earlier = job_folders(root)
        identity = _identity(overrides)
        same = [one for one in earlier if _identity(one.overrides) == identity]
        for one in same:
            if (one.launch, one.number) == (launch, number):
                return one.folder
        taken = {one.folder for one in earlier if one.launch == launch}
        free = [one for one in same if one.folder not in taken]
        if free:
            folder = min(free, key=lambda one: one.number != number).folder
        else:
            numbers = {number_of(one.folder) for one in earlier}
            folder = f"{number if number not in numbers else max(numbers) + 1}_{name}"
        _append(root / JOBS, JobFolder(launch, number, list(overrides), folder, round(time.time(), 3)))
        return folder


def slug(text: str) -> str:
    """`text` as one folder name: no separators, 120 bytes at most."""
    name = re.sub(r"[^\w.,=+-]+", "_", text).strip("._")
    return name.encode()[:120].decode(errors="ignore") or "job"


def job_folders(sweep: Path) -> list[JobFolder]:
    """All job folders of a sweep, oldest first; a line cut short by a kill is left out."""
    path = sweep / JOBS
    folders = []
    for line in read_text(path).splitlines() if path.exists() else ():
        try:
            one = JobFolder(**json.loads(line))
        except (ValueError, TypeError, RecursionError):
            continue
        if isinstance(one.folder, str) and isinstance(one.launch, int) and _is_text(one.overrides):
            folders.append(one)
    return folders


def _is_text(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def number_of(folder: str | Path) -> int:
    """The number that a job's folder begins with; -1 for a folder that the user has named."""
    digits = re.match(r"\d+(?=_)", Path(folder).name)
    return int(digits[0]) if digits else -1


def record_folder(sweep: Path, launch: int, number: int, folder: str, overrides: Sequence[str]) -> None:
    """Records a folder that the user's own `hydra.sweep.subdir` gives to a job.

    Raises:
        UsageError: if it is the folder of another job.
    """
    with FileLock(sweep / LOCK, timeout=120):
        same = [one for one in job_folders(sweep) if one.folder == folder]
        for one in same:
            if _identity(one.overrides) != _identity(overrides):
                raise UsageError(
                    f"hydra.sweep.subdir={folder}: is the folder of the job {' '.join(one.overrides)} too; "
                    "leave it out, or let it follow from the overrides"
                )
        if not any((one.launch, one.number) == (launch, number) for one in same):
            _append(sweep / JOBS, JobFolder(launch, number, list(overrides), folder, round(time.time(), 3)))


def begin_launch(sweep: Path, launch: Launch) -> int:
    """Records a launch and returns its number, 0 for a sweep's first.

    Job folders of a sweep that was run before `jobs.jsonl` was kept are recorded too.

    Raises:
        UsageError: if the list of launches is damaged, or an earlier one was composed from other files.
    """
    sweep.mkdir(parents=True, exist_ok=True)
    with FileLock(sweep / LOCK, timeout=120):
        earlier = launches(sweep)
        for one in earlier.values():
            if one.files != launch.files:
                raise UsageError(
                    f"{sweep}: its jobs are composed from {' '.join(one.files) or 'no files but accumexp'}, "
                    f"and this command's from {' '.join(launch.files) or 'none'}; give the same flags, or "
                    "begin a new sweep"
                )
        for path in [] if (sweep / JOBS).exists() else sweep.glob("[0-9]*_*"):
            folder, summary = RunFolder(path), RunFolder(path).summary()
            if summary:
                changed = folder.summary_file.stat().st_mtime
                entry = JobFolder(0, number_of(path), summary.overrides, path.name, changed)
                _append(sweep / JOBS, entry)
        number = 1 + max([*earlier, *(one.launch for one in job_folders(sweep))], default=-1)
        entries = {str(key): asdict(value) for key, value in {**earlier, number: launch}.items()}
        write_json(sweep / LAUNCHES, entries)
        return number


def launches(sweep: Path) -> dict[int, Launch]:
    """The launches of a sweep by their number, including those that started no job.

    Raises:
        UsageError: if the list of them is damaged.
    """
    path = sweep / LAUNCHES
    if not path.exists():
        return {}
    try:
        entries = json.loads(read_text(path)).items()
        written = {int(number): Launch(**_with_files(entry)) for number, entry in entries}
        for one in written.values():
            if not all(map(_is_text, ([one.command], one.task, one.hydra, one.files))):
                raise TypeError
        return written
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise UsageError(f"{path}: is damaged; if removed, multirun.yaml counts in its place") from None


def _with_files(entry: dict[str, Any]) -> dict[str, Any]:
    """A launch's entry; that of an earlier version has no files, and its command line names them."""
    return {"files": file_flags(shlex.split(entry["command"])), **entry}


def distinct_launches(sweep: Path) -> list[Launch]:
    """The launches of a sweep, oldest first; of several with the same jobs the newest.

    A launch that started no job is left out.
    """
    started = {one.launch for one in job_folders(sweep)}
    distinct: dict[tuple[str, ...], Launch] = {}
    for number, launch in sorted(launches(sweep).items()):
        if number in started:
            sweeper = [word for word in launch.hydra if word.lstrip("+~").startswith(SWEEPER)]
            distinct[tuple([*_identity(launch.task), *sweeper])] = launch
    return list(distinct.values())


def has_jobs(sweep: Path, launch: int) -> bool:
    """Whether a job of this launch has started; a bad command line changes nothing in an old sweep."""
    return not launch or any(one.launch == launch for one in job_folders(sweep))


def _identity(overrides: Sequence[str]) -> list[str]:
    """The overrides that identify a job; how the sweep is reported on is no part of it."""
    return sorted(one for one in overrides if not one.lstrip("+~").startswith(REPORT))


def _append(path: Path, entry: Any) -> None:
    cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(asdict(entry)) + "\n")
