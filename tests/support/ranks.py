"""Several real processes in one gloo group, for tests of what happens between ranks."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .forked import CONTEXT


def on_ranks(
    size: int,
    folder: Path,
    function: Callable[..., Any],
    *arguments: Any,
    cuda: bool = False,
    seconds: float = 120,
) -> list[Any]:
    """What `function(*arguments)` returns on each of `size` ranks; tensors and plain values.

    `function` is found by its name in its module. With `cuda` each rank has a GPU, and nccl between them.
    A failure on any rank fails the test with its traceback.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = [
        CONTEXT.Process(target=_rank, args=(rank, size, folder, function, arguments, cuda), daemon=True)
        for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(seconds)
    failed = sorted(folder.glob("error-*"))
    assert not failed, "\n".join(path.read_text() for path in failed)
    assert [rank.exitcode for rank in ranks] == [0] * size
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(size)]


def _rank(
    rank: int, size: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...], cuda: bool
) -> None:
    torch.set_num_threads(1)
    if cuda:
        torch.cuda.set_device(rank)
    try:
        store = dist.FileStore(str(folder / "store"), size)  # pyright: ignore[reportPrivateImportUsage]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=180),
            )
            torch.save(function(*arguments), folder / f"result-{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
