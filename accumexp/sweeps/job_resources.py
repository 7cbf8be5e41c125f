"""A job's part of its machine: CPU threads where the launcher runs several jobs at once, and memory."""

from __future__ import annotations

import multiprocessing
from typing import Any

from ..config.schema import Config
from ..config.sizes import AUTO
from ..environment.cores import cores
from ..errors import UsageError


def share_cores(config: Config, launcher: Any, batch: int | None) -> None:
    """Sets the threads of a job that may run beside others, and disables its progress bar.

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
    """Refuses a job that would take all free memory of a machine that it shares with others.

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
        launcher: `hydra.launcher`; cores of a job that it names replace an equal share.
        batch: the jobs that the sweep hands to it together, None if that is not known.
    """
    name = _name(launcher)
    job_cores: float | None = None  # as the launcher's configuration gives them
    if name == "joblib":
        at_once = _joblib_workers(launcher.get("n_jobs"))
    elif name == "submitit_local":
        at_once = batch or cores()  # it starts the whole batch at once
        if launcher.get("cpus_per_task"):
            job_cores = launcher["cpus_per_task"] * (launcher.get("tasks_per_node") or 1)
    elif name == "ray":
        init, remote = launcher["ray"].get("init") or {}, launcher["ray"].get("remote") or {}
        job_cores = remote.get("num_cpus")
        if job_cores is None and init.get("address"):
            job_cores = 1  # Ray's default; its machine has other jobs
        at_once = int(init.get("num_cpus") or cores())
    else:
        return None
    at_once = min(at_once, batch or at_once)
    if job_cores is None:
        if at_once == 1:
            return None
        job_cores = cores() // at_once
    return max(1, int(job_cores) // processes)


def _name(launcher: Any) -> str:
    """The launcher's name as `hydra/launcher=` takes it, for those whose jobs share this machine."""
    names = {"JoblibLauncher": "joblib", "LocalLauncher": "submitit_local", "RayLauncher": "ray"}
    return names.get(str(launcher.get("_target_", "")).rpartition(".")[2], "")


def _joblib_workers(n_jobs: int | None) -> int:
    """Workers for joblib's `n_jobs`, in which -1 is all cores and -2 all but one."""
    jobs = int(n_jobs or 1)
    return jobs if jobs > 0 else max(1, cores() + 1 + jobs)
