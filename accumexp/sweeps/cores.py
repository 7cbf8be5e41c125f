"""Which share of the machine a job of a sweep has.

Threads of jobs that run at the same time on the same cores wait for each other in every operation, so each
job gets as many threads as there are cores for it. How many run at once is the launcher's to say.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

from ..config.schema import Config
from ..config.sizes import AUTO
from ..environment.cores import cores
from ..errors import UsageError


def share_cores(config: Config, launcher: Any, batch: int | None) -> None:
    """Gives a job that may have others beside it its threads, and keeps its live bar off their terminal.

    Args:
        launcher, batch: as `threads_of_a_rank` takes them.
    """
    # joblib's workers start processes by a method that torch's DataLoader cannot use.
    if multiprocessing.get_start_method(allow_none=True) == "loky":
        multiprocessing.set_start_method("spawn", force=True)
    if config.trainer.threads is None:
        config.trainer.threads = threads_of_a_rank(launcher, batch, config.accum.processes or 1)
    if _name(launcher) in ("joblib", "ray") and "progress" in config.callbacks:
        config.callbacks["progress"]["show"] = False


def check_memory(config: Config, launcher: Any, batch: int | None) -> None:
    """Refuses a job that would take the free memory of a machine on which others run at the same time.

    Args:
        launcher, batch: as `threads_of_a_rank` takes them.

    Raises:
        UsageError: naming `accum.steps`.
    """
    takes_all = config.accum.steps == AUTO and config.accum.memory_limit is None
    if takes_all and threads_of_a_rank(launcher, batch, 1) is not None:
        raise UsageError(
            f"accum.steps={AUTO}: jobs that run at the same time would each take all memory that is free, "
            "give accum.memory_limit"
        )


def threads_of_a_rank(launcher: Any, batch: int | None, processes: int) -> int | None:
    """Threads for each of the `processes` ranks of a job, None where jobs do not share this machine's cores.

    Args:
        launcher: `hydra.launcher`, whose words for a job's cores go before an equal share.
        batch: the jobs that the sweep hands to it together, None if that is not known.
    """
    name = _name(launcher)
    given: float | None = None  # cores of a job, by the launcher's own words
    if name == "joblib":
        at_once = _joblibs_workers(launcher.get("n_jobs"))
    elif name == "submitit_local":
        at_once = batch or cores()  # it starts all that it is handed
        if launcher.get("cpus_per_task"):
            given = launcher["cpus_per_task"] * (launcher.get("tasks_per_node") or 1)
    elif name == "ray":
        init, remote = launcher["ray"].get("init") or {}, launcher["ray"].get("remote") or {}
        given = remote.get("num_cpus")
        if given is None and init.get("address"):
            given = 1  # what Ray reserves; the machine it will be on has other jobs
        at_once = int(init.get("num_cpus") or cores())
    else:
        return None
    at_once = min(at_once, batch or at_once)
    if given is None:
        if at_once == 1:
            return None
        given = cores() // at_once
    return max(1, int(given) // processes)


def _name(launcher: Any) -> str:
    """The launcher's name as `hydra/launcher=` takes it, for those whose jobs share this machine."""
    names = {"JoblibLauncher": "joblib", "LocalLauncher": "submitit_local", "RayLauncher": "ray"}
    return names.get(str(launcher.get("_target_", "")).rpartition(".")[2], "")


def _joblibs_workers(n_jobs: int | None) -> int:
    """Workers for joblib's `n_jobs`, in which -1 is all cores and -2 all but one."""
    jobs = int(n_jobs or 1)
    return jobs if jobs > 0 else max(1, cores() + 1 + jobs)
