"""The rank of this process, its device, and its process group.

A rank is given by torchrun's environment variables: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

from ..errors import UsageError

# A rank may wait this long for the others, which may be reading data; a dead rank is noticed at once.
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class RankInfo:
    """`rank` of `size` processes, `local_rank` of `local_size` on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone prints, logs and writes."""
        return self.rank == 0


def launched_rank() -> RankInfo | None:
    """The rank that torchrun or a cluster's job gives this process, or None."""
    _adopt_cluster_job()
    environment = os.environ
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    size = int(environment["WORLD_SIZE"])
    local_size = int(environment.get("LOCAL_WORLD_SIZE", size))
    return RankInfo(int(environment["RANK"]), size, int(environment.get("LOCAL_RANK", 0)), local_size)


def silent_rank_overrides(folder: str) -> list[str]:
    """Hydra's arguments for a rank other than the first: no logging, and output in `folder`."""
    folders = [f"hydra.run.dir='{folder}'", f"hydra.sweep.dir='{folder}'", "hydra.output_subdir=null"]
    return [*folders, "hydra/job_logging=none", "hydra/hydra_logging=none"]


def _adopt_cluster_job() -> None:
    """Sets torchrun's variables in a submitit job of several tasks, each of them a rank."""
    if "RANK" in os.environ or not any(key.startswith(("SUBMITIT_", "SLURM_")) for key in os.environ):
        return
    try:
        from submitit import JobEnvironment
        from submitit.helpers import TorchDistributedEnvironment

        tasks = JobEnvironment().num_tasks
    except (ImportError, RuntimeError):  # no submitit, or a shell on a cluster's node
        return
    if tasks > 1:
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)


def default_processes(device: str) -> int:
    """One per GPU, one for a named GPU; without GPUs two, if there are two cores."""
    import torch

    if device.startswith("cuda:"):
        return 1
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(2, os.cpu_count() or 1)


def check_devices(processes: int, device: str) -> None:
    """
    Raises:
        UsageError: if `processes` on this machine cannot each have a GPU of its own.
    """
    import torch

    if device.startswith("cuda:") and processes > 1:
        raise UsageError(
            f"device={device}: each of {processes} processes takes a GPU of its own, give device=cuda"
        )
    on_gpus = device == "cuda" or device == "auto" and torch.cuda.is_available()
    if on_gpus and torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UsageError(
            f"accum.processes={processes}: this machine has {torch.cuda.device_count()} GPUs, one for each "
            "process; device=cpu runs them on the CPU"
        )


def device_of(device: str, rank_info: RankInfo) -> str:
    """The name of this rank's device: `auto` is a GPU if there is one; each rank has its own."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cuda" or rank_info.size == 1:
        return device
    # A cluster may show each task its own GPU alone, which is then number 0.
    return f"cuda:{0 if torch.cuda.device_count() == 1 else rank_info.local_rank}"


@contextmanager
def process_group(rank_info: RankInfo, device: str) -> Iterator[None]:
    """Joins the ranks' process group: nccl between GPUs, gloo between CPUs.

    A group of launched ranks lasts until the end of the process, because a sweep's jobs share it.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    options: dict[str, Any] = {"backend": "gloo", "timeout": TIMEOUT}
    if device.startswith("cuda"):
        options["backend"] = "cpu:gloo,cuda:nccl"
        if ":" in device:
            torch.cuda.set_device(device)
    launched = launched_rank() is not None
    if not launched:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        options.update(store=store, rank=0, world_size=1)
    dist.init_process_group(**options)
    if launched:
        atexit.register(_leave)
    yield
    if not launched:
        dist.destroy_process_group()


def exit_immediately(code: int) -> NoReturn:
    """Ends a rank without the teardown of Python and C++, which may wait for ranks that are gone."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_skip_teardown = False


def skip_group_teardown() -> None:
    """Leaves the group without a teardown at the end of the process, because other ranks may be gone."""
    global _skip_teardown
    _skip_teardown = True


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized() and not _skip_teardown:
        dist.destroy_process_group()


def broadcast_from_first(text: str, rank_info: RankInfo) -> str:
    """Returns the first rank's `text` on every rank of a joined group."""
    import torch.distributed as dist

    texts: list[Any] = [text]
    if rank_info.size > 1:
        dist.broadcast_object_list(texts)
    return texts[0]


def barrier(rank_info: RankInfo) -> None:
    """Waits for every rank of a joined group."""
    import torch.distributed as dist

    if rank_info.size > 1:
        dist.barrier()


@contextmanager
def local_first(rank_info: RankInfo) -> Iterator[None]:
    """Runs the body on the first rank of each machine, which may download, and then on the others."""
    if rank_info.local_rank:
        barrier(rank_info)
    yield
    if not rank_info.local_rank:
        barrier(rank_info)
