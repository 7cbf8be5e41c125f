"""Communication, memory and time of a fully sharded window, reduced once or in every micro-batch, and of DDP.

python -m benchmarks.sharded --ranks 2 --steps 1,2,4,8 --json sharded.json
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from accumexp.accum import data_parallel, fully_sharded
from accumexp.environment.device import wait_for
from accumexp.environment.memory import MIB, reset_peak_memory

from .measure import Rows, table_of
from .ranks import (
    Loop,
    Task,
    arguments,
    gradient_error,
    parser_of,
    run,
    times_of,
    timings,
    windowed,
)


def sharded(task: Task, reduce_always: bool) -> Loop:
    return windowed(task, fully_sharded(task.model(), task.device), reduce_always)


LOOPS: dict[str, Callable[[Task], Loop]] = {
    "once a window": lambda task: sharded(task, reduce_always=False),
    "every micro-batch": lambda task: sharded(task, reduce_always=True),
    "DDP": lambda task: windowed(task, data_parallel(task.model())),
}
# By kind: its names in torch, of which a release has one or both; position and keywords of the argument
# that is the whole tensor, which is the output of a gather and the input of a scatter.
COLLECTIVES = {
    "reduce_scatter": (("reduce_scatter_single", "reduce_scatter_tensor"), 1, ("input", "input_tensor")),
    "all_gather": (("all_gather_single", "all_gather_into_tensor"), 0, ("output_tensor",)),
    "all_reduce": (("all_reduce",), 0, ("tensor",)),
}


class Collectives:
    """Numbers of this rank's collectives, bytes of their whole tensors, and which of these are alive."""

    def __init__(self) -> None:
        self.count = dict.fromkeys(COLLECTIVES, 0)
        self.bytes = dict.fromkeys(COLLECTIVES, 0)
        self._buffers: dict[str, list[tuple[StorageWeakRef, int]]] = {kind: [] for kind in COLLECTIVES}

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, the functions of torch.distributed that `fully_shard` calls are counted."""
        with contextlib.ExitStack() as stack:
            for kind, (names, place, keywords) in COLLECTIVES.items():
                for name in names:
                    if original := getattr(dist, name, None):
                        stack.enter_context(
                            patch.object(dist, name, self._counted(kind, original, place, keywords))
                        )
            yield

    def _counted(
        self, kind: str, original: Callable[..., Any], place: int, keywords: tuple[str, ...]
    ) -> Callable[..., Any]:
        def counted(*values: Any, **named: Any) -> Any:
            given = [named[keyword] for keyword in keywords if keyword in named]
            tensor: Tensor = given[0] if given else values[place]
            self.count[kind] += 1
            self.bytes[kind] += tensor.nbytes
            storage = tensor.untyped_storage()
            self._buffers[kind].append((StorageWeakRef(storage), storage.nbytes()))
            return original(*values, **named)

        return counted

    def alive(self, kind: str) -> int:
        """Bytes of the whole tensors that are still referenced."""
        self._buffers[kind] = [held for held in self._buffers[kind] if not held[0].expired()]
        return sum(size for _, size in self._buffers[kind])


def held(collectives: Collectives) -> tuple[int, int]:
    """Bytes that this rank holds of (parameters, gradients), in shards or whole.

    Counts all parameters in this process, among them the whole ones that `fully_shard` empties while they are
    not needed, and the buffers of gathers and scatters that are still alive.
    """
    parameters: dict[int, int] = {}
    gradients: dict[int, int] = {}
    for candidate in gc.get_objects():
        # By its type, as some objects warn when `__class__` is read.
        if issubclass(type(candidate), Tensor) and isinstance(candidate, nn.Parameter):
            for tensor, kind in ((candidate, parameters), (candidate.grad, gradients)):
                if tensor is not None:
                    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                    storage = local.detach().untyped_storage()
                    kind[storage._cdata] = storage.nbytes()
    return (
        sum(parameters.values()) + collectives.alive("all_gather"),
        sum(gradients.values()) + collectives.alive("reduce_scatter"),
    )


def traffic(build: Callable[[Task], Loop], task: Task) -> dict[str, Any]:
    """One window's collectives on this rank and the bytes held; no other loop may be in the process.

    "between" is the most before any micro-batch but the first, None in a window of one; "at rest" is
    before the window; the peak is what torch allocated on a GPU during the window, None on a CPU.
    """
    gc.collect()
    collectives = Collectives()
    with collectives.counting():
        loop = build(task)
        loop.accumulate()  # DDP rebuilds its buckets after its first backward
        loop.step()
        loop.model.zero_grad()
        wait_for(task.device)
        at_rest, _ = held(collectives)
        assert loop.window is not None
        sync = loop.window.sync
        micro_batch = sync.micro_batch
        between: list[tuple[int, int]] = []

        def measuring(last: bool) -> contextlib.AbstractContextManager[Any]:
            wait_for(task.device)
            between.append(held(collectives))
            return micro_batch(last)

        with patch.object(sync, "micro_batch", measuring):
            loop.accumulate()
        counts = dict.fromkeys(COLLECTIVES, 0)
        collectives.count, collectives.bytes = counts, dict(counts)
        reset_peak_memory(task.device)
        loop.accumulate()
        wait_for(task.device)
    row: dict[str, Any] = {}
    for kind in COLLECTIVES:
        row |= {f"{kind}s": collectives.count[kind], f"{kind}_bytes": collectives.bytes[kind]}
    whole, gradients = map(max, zip(*between[1:], strict=True)) if between[1:] else (None, None)
    row |= {"gradient_bytes_between": gradients, "parameter_bytes_between": whole}
    row |= {"parameter_bytes_at_rest": at_rest}
    on_gpu = task.device.type == "cuda"
    return row | {"peak_bytes": torch.cuda.max_memory_allocated(task.device) if on_gpu else None}


def measured(task: Task, updates: int, repeats: int) -> Rows:
    """A row for each loop."""
    rows = [
        {"ranks": task.ranks, "steps": task.steps, "loop": name} | traffic(build, task)
        for name, build in LOOPS.items()
    ]
    loops = [build(task) for build in LOOPS.values()]
    for row, loop in zip(rows, loops, strict=True):
        row["gradient_error"] = gradient_error(loop, task)
    times = timings(loops, task, updates, repeats)
    return [row | time for row, time in zip(rows, times, strict=True)]


def show(report: dict[str, Any]) -> list[Table]:
    moved = "reduce-\nscatters,all-\nreduces,MiB\nreduced,all-\ngathers,MiB\ngathered"
    names = ("gradient_bytes_between", "parameter_bytes_at_rest")
    kept = "gradient\nbetween,weights\nat rest"
    if report["environment"]["backend"] == "nccl":
        names, kept = (*names, "peak_bytes"), f"{kept},peak"
    window = table_of("one window: collectives, MiB held", f"ranks,steps,loop,{moved},{kept}")
    update = table_of("an update", "ranks,steps,loop,median\nms,ratio,quartiles,gradient\noff by")
    for row in report["rows"]:
        first = [str(row[name]) for name in ("ranks", "steps", "loop")]
        reduced = row["reduce_scatter_bytes"] + row["all_reduce_bytes"]
        cells = [str(row["reduce_scatters"]), str(row["all_reduces"]), _mib(reduced)]
        cells += [str(row["all_gathers"]), _mib(row["all_gather_bytes"])]
        last = row["loop"] == list(LOOPS)[-1]
        window.add_row(*first, *cells, *(_mib(row[name]) for name in names), end_section=last)
        update.add_row(*first, *times_of(row), end_section=last)
    return [window, update]


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:.2f}"


def main() -> None:
    parser = parser_of("benchmarks.sharded", __doc__, ranks="2")
    parser.set_defaults(model="mlp")
    options = arguments(parser)
    if min(options.ranks) < 2:
        parser.error("--ranks: at least 2")
    run(options, measured, show)


if __name__ == "__main__":
    main()
