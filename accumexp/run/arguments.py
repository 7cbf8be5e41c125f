"""The command line of `run`, with the arguments that `resume=`, `sweep.resume=` and `replicas=` add."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..config.overrides import report_from
from ..config.trust import Trust
from ..errors import UsageError
from ..sweeps.hydra_sweep import ADDED, MULTIRUN, file_flags
from ..sweeps.job_folders import REPORT, Launch, distinct_launches
from ..tracking.run_folder import CHECKPOINTS, RunFolder
from ..tracking.yaml_file import read_yaml
from .sweep_trust import check_taken

SWEEP = "sweep.resume="


def command_lines(arguments: Sequence[str]) -> tuple[list[list[str]], dict[str, str]]:
    """The arguments of each of Hydra's runs, and the `report.*` settings of a resumed sweep."""
    if any(a.startswith(SWEEP) for a in arguments):
        return sweep_arguments(arguments)
    return [resume_arguments(replicas_arguments(arguments))], {}


def replicas_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments, turned into a sweep of one job if they contain `replicas=` of several."""
    counts = [a.partition("=")[2] for a in arguments if a.startswith("replicas=")]
    plain = any(a.startswith(("resume=", "--")) for a in arguments) or MULTIRUN & set(arguments)
    several = bool(counts) and counts[-1].isdigit() and int(counts[-1]) > 1
    return ["-m", "hydra/hydra_logging=none", *arguments] if several and not plain else list(arguments)


def resume_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the resumed run's folder as Hydra's. Raises a `UsageError` if there is none."""
    arguments = list(arguments)
    where = next((a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("resume=")), None)
    if where in (None, "", "null"):
        return arguments
    if given := next((a for a in arguments if a.lstrip("+").startswith("hydra.run.dir=")), None):
        raise UsageError(f"{given}: a resumed run goes on in its own folder, leave it out")
    if MULTIRUN & set(arguments):
        raise UsageError("resume: goes on with one run, leave out -m")
    folder = resumed_folder(str(where))
    if set("=,") & set(where):  # a job's folder has them, and an override needs quotes
        arguments = [f"resume='{where}'" if a.startswith("resume=") else a for a in arguments]
    return [*arguments, f"hydra.run.dir='{folder}'", "hydra.output_subdir=null"]


def resumed_folder(where: str) -> Path:
    """The folder of the run that `resume=<where>` names, absolute.

    Raises:
        UsageError: if it is not there.
    """
    folder = Path(where)
    if not folder.exists():
        raise UsageError(f"resume={where}: no such file or folder, give a run's folder or a checkpoint")
    if not (folder.is_file() or folder.is_dir()):
        raise UsageError(f"resume={where}: is no file and no folder, give a run's folder or a checkpoint")
    if folder.is_file():
        folder = RunFolder.of_checkpoint(folder).path
    elif folder.name == CHECKPOINTS:
        folder = folder.parent
    return folder.resolve()


def sweep_arguments(arguments: Sequence[str]) -> tuple[list[list[str]], dict[str, str]]:
    """The arguments of the launches that resume `sweep.resume=<folder>`, and the `report.*` settings.

    Without overrides of the task, every set of jobs of the earlier launches is launched again, with its
    overrides of Hydra unless they are given again.

    Raises:
        UsageError: if there is no sweep in the folder, without `-m`, or for a wrong `report.*` setting.
    """
    (where, *more) = [a.removeprefix(SWEEP) for a in arguments if a.startswith(SWEEP)]
    rest = [a for a in arguments if a and not a.startswith(SWEEP) and _key(a) != "trust"]
    trust = Trust.given(next((a.partition("=")[2] for a in arguments if _key(a) == "trust"), None))
    if more:
        raise UsageError("sweep.resume: goes on with one sweep, give one folder")
    if any(a.startswith("resume=") for a in rest):
        raise UsageError("sweep.resume: goes on with all runs of a sweep, leave out resume=")
    if not MULTIRUN & set(rest):
        raise UsageError(f"{SWEEP}{where}: goes on with a sweep, add -m")
    folder = Path(where.strip("'\""))
    if not where or not (folder / "multirun.yaml").is_file():
        raise UsageError(f"{SWEEP}{where}: no sweep there, give the folder of one, which holds multirun.yaml")
    report_settings = [a for a in rest if _key(a).startswith(REPORT)]
    changes = {_key(a): a.partition("=")[2] for a in report_settings}
    report_from({}, changes)
    rest = [a for a in rest if a not in report_settings]
    earlier = distinct_launches(folder) or [_last_launch(folder)]
    if not file_flags(rest):
        check_taken([], earlier[-1].files, where, trust)
        rest = [*earlier[-1].files, *rest]
    given = {_key(a) for a in rest if a[0] != "-" and ("=" in a or a[0] == "~")}
    if "report" in given:
        raise UsageError(f"{SWEEP}{where}: give a report's settings one by one, such as report.margin=2")
    lines = [rest]
    if all(key.startswith("hydra") for key in given):
        taken = [
            [*launch.task, *(a for a in launch.hydra if not _replaced(_key(a), given))] for launch in earlier
        ]
        for line in taken:
            check_taken(line, [], where, trust)
        lines = [[*rest, *line] for line in taken]
    return [[*line, f"hydra.sweep.dir='{folder.resolve()}'"] for line in lines], changes


def _last_launch(sweep: Path) -> Launch:
    """A sweep's newest launch, as Hydra recorded it."""
    path = sweep / "multirun.yaml"
    written: Any = OmegaConf.to_container(read_yaml(path), resolve=False)
    try:
        overrides = written["hydra"]["overrides"]
        task, hydra = ([str(one) for one in overrides[name]] for name in ("task", "hydra"))
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path}: is damaged: it has no overrides") from error
    return Launch("", task, hydra)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def _replaced(key: str, given: set[str]) -> bool:
    """Whether a sweep's override of Hydra is given again, or belongs to a group that is."""
    groups = {other.replace("/", ".") for other in given if "/" in other}
    return key in ADDED | given or any(key.startswith(f"{group}.") for group in groups)
