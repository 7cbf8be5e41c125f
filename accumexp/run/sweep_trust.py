"""What `sweep.resume=` takes from a sweep's folder, which may be another's, and what may run code of it.

Imports torch only for a sweep that names targets.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..config.trust import Refusal, Trust, check_targets, impure_values
from ..errors import UsageError, first_line
from ..sweeps.job_folders import distinct_launches

NO_TRUST = Trust()

# Keys of Hydra's that choose an installed launcher or sweeper, or give it numbers and names.
HARMLESS = re.compile(
    r"hydra/(launcher|sweeper)|hydra\.mode|hydra\.job\.chdir|hydra\.sweep\.\w+|hydra\.callbacks\.sweep\.launch"
    r"|hydra\.sweeper\.(max_batch_size|params\..*)"
    r"|hydra\.launcher\.(n_jobs|timeout_min|cpus_per_task|gpus_per_node|tasks_per_node|mem_gb|nodes|name|backend"
    r"|verbose|batch_size|pre_dispatch|partition|qos|account|array_parallelism|max_num_timeout|gres|constraint)"
)


def check_taken(lines: Sequence[str], files: Sequence[str], where: str, trust: Trust) -> None:
    """Refuses overrides and flags of a sweep's earlier launches that could run code in this one.

    Args:
        lines: overrides of the task and of Hydra.
        files: the flags that choose configuration files, see `hydra_sweep.file_flags`.
        where: the sweep's folder, as it was given.

    Raises:
        UsageError: naming the first, and what to add.
    """
    if trust.everything:
        return
    if files:
        raise UsageError(
            f"sweep.resume={where}: its jobs are composed from {' '.join(files)}, which may name any code; "
            "give these flags again, or trust=true if the sweep is your own"
        )
    plain: dict[str, list[Any]] = {}
    for override in _parsed(lines, where):
        key, line = override.key_or_group, override.input_line
        values = override.value()
        values = [_text(one) for one in (values.list if override.is_choice_sweep() else [values])]
        of_hydra = key.startswith("hydra") or "hydra" in str(override.package)
        if of_hydra and not (HARMLESS.fullmatch(key) and all(_is_plain(key, one) for one in values)):
            raise UsageError(
                f"sweep.resume={where}: {line} is taken from that folder, and may run code; give it again, "
                "or trust=true if the sweep is your own"
            )
        if any(True for _ in impure_values(values)):
            raise UsageError(
                f"sweep.resume={where}: {line} is taken from that folder, and may read the environment; add "
                "trust=true if the sweep is your own"
            )
        parent, _, last = key.rpartition(".")
        if last == "_target_":
            plain.setdefault(parent, []).extend({last: one} for one in values)
        else:
            plain.setdefault(key, []).extend(values)
    if "_target_" in str(plain):
        from ..training.known_targets import refusal_of_targets

        check_targets(plain, f"sweep.resume={where}", (), trust, _any_kind(refusal_of_targets({})))


def needed_trust(sweep: Path) -> str:
    """What `sweep.resume=` of the folder needs besides, such as the flags of its files; empty for nothing."""
    lines: list[str] = []
    files: list[str] = []
    for launch in distinct_launches(sweep):
        lines, files = [*lines, *launch.task, *launch.hydra], launch.files
    named = re.findall(r"_target_[=: ]+['\"]?(\w+)", " ".join(lines))
    packages = sorted(set(named) - {"accumexp", "torch", "torchvision", "torchmetrics"})
    flags = "".join(f" {shlex.quote(flag)}" for flag in files)
    trusts = {"": NO_TRUST}
    if packages:
        trusts[f" trust=[{','.join(packages)}]"] = Trust(packages=frozenset(packages))
    for text, trust in trusts.items():
        with suppress(UsageError):
            check_taken(lines, [], str(sweep), trust)
            return flags + text
    return f"{flags} trust=true"


def _is_plain(key: str, value: Any) -> bool:
    """Whether a value of the launcher's is a number or a word: a launcher writes some into a shell script."""
    return not key.startswith("hydra.launcher.") or re.fullmatch(r"[\w.:-]*", str(value)) is not None


def _any_kind(refusal_of: Any) -> Any:
    """`refusal_of` for an argument of any key: the jobs' own checkpoints are checked by key."""

    def why(key: str, target: str, trust: Trust) -> Refusal | None:
        return refusal_of("", target, trust)

    return why


def _parsed(lines: Iterable[str], where: str) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_overrides(list(lines))
    except HydraException as error:
        raise UsageError(f"sweep.resume={where}: its launches are damaged: {first_line(error)}") from error


def _text(value: Any) -> Any:
    """`value` with text in place of the parser's own kinds, such as quoted text and sweeps inside of it."""
    if isinstance(value, dict):
        return {str(_text(key)): _text(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_text(child) for child in value]
    return value if isinstance(value, int | float | bool | str | None) else str(getattr(value, "text", value))
