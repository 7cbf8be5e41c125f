"""A sweep in Hydra's configuration: its launcher, jobs and command line. Imports no torch."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

# Overrides that Hydra or an earlier `sweep.resume=` has added to those of the command line.
LAUNCH = "hydra.callbacks.sweep.launch"
ADDED = {"hydra.mode", "hydra.sweep.dir", LAUNCH}
MULTIRUN = {"-m", "--multirun"}


def count_jobs(sweeper: Any, overrides: Sequence[str]) -> tuple[int | None, list[str]]:
    """(Number of jobs that Hydra's own sweeper makes of a multirun's overrides, the keys that vary).

    (None, []) for another sweeper, which decides as it goes, and for a glob, which needs the whole
    configuration.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not str(sweeper.get("_target_", "")).endswith(".BasicSweeper"):
        return None, []
    lines = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    values: dict[str, int] = {}
    try:
        # The last override of a key counts.
        for override in OverridesParser.create().parse_overrides([*lines, *overrides]):
            several = list(override.sweep_string_iterator()) if override.is_sweep_override() else [None]
            values[override.get_key_element()] = len(several)
    except HydraException:
        return None, []
    return math.prod(values.values()), [key.lstrip("+") for key, count in values.items() if count > 1]


def typed_overrides(hydra: Any) -> tuple[list[str], list[str]]:
    """The overrides of the task and of Hydra, as they were typed.

    Reading them from `hydra.overrides` resolves their interpolations, such as those of the environment.
    """
    lines: Any = OmegaConf.to_container(hydra.overrides, resolve=False)
    return list(lines["task"]), list(lines["hydra"])


FILE_FLAGS = {"-cn": "--config-name", "-cd": "--config-dir", "-cp": "--config-path"}


def file_flags(arguments: Sequence[str]) -> list[str]:
    """The flags that choose the files a command is composed from, in their long form, with absolute paths."""
    chosen: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        flag = FILE_FLAGS.get(flag, flag)
        if flag in FILE_FLAGS.values():
            chosen[flag] = value if equals else next(words, "")
    return [
        f"{flag}={value if flag == '--config-name' else Path(value).absolute()}"
        for flag, value in sorted(chosen.items())
    ]


def file_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments that choose the files a command is composed from: `file_flags` and the search path."""
    return [*file_flags(arguments), *(one for one in arguments if one.startswith("hydra.searchpath="))]


def runs_in_parallel(launcher: Any) -> bool:
    """Whether a launcher may run several jobs at a time: any but Hydra's own."""
    return not str(launcher.get("_target_", "")).endswith(".BasicLauncher")


def command_line(arguments: Sequence[str], command: str = "run") -> str:
    """The command with these arguments, in the shell's quoting."""
    return shlex.join(["python", "-m", f"accumexp.{command}", *arguments])
