"""Times a window on several ranks and counts its all-reduces, in turns with loops written by hand.

python -m benchmarks.ranks --ranks 1,2 --steps 1,2,4,8 --json ranks.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from accumexp.accum import OptimizerStep, Window, data_parallel
from accumexp.environment.device import wait_for
from accumexp.models import MLP, LeNet5

from .measure import (
    Rows,
    at_least_1,
    environment,
    finish,
    in_turns,
    numbers,
    output_options,
    prepare,
    ratio_of,
    table_of,
)

SEED = 0
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Task:
    """The work of every loop: windows of `steps` micro-batches on each of `ranks` ranks."""

    device: torch.device
    ranks: int
    steps: int
    micro_batch: int
    width: int | None

    def batch(self, rank: int) -> tuple[Tensor, Tensor]:
        """The samples of `rank` in one window: (n, 1, 32, 32) images and (n,) labels."""
        samples, generator = self.micro_batch * self.steps, torch.Generator().manual_seed(rank)
        images = torch.randn(samples, 1, 32, 32, generator=generator)
        labels = torch.randint(0, 10, (samples,), generator=generator)
        return images.to(self.device), labels.to(self.device)

    def model(self) -> nn.Module:
        torch.manual_seed(SEED)
        made = LeNet5() if self.width is None else MLP(32 * 32, 10, (self.width, self.width))
        return made.to(self.device)


Measured = Callable[[Task, int, int], Rows]
Show = Callable[[dict[str, Any]], list[Table]]


@dataclass(frozen=True)
class Loop:
    """A window and a step; `window` is set if they are accumexp's."""

    model: nn.Module
    accumulate: Callable[[], object]
    step: Callable[[], object]
    window: Window | None = None


def hand_written(task: Task, counted: bool = False, reduce_always: bool = False) -> Loop:
    """DDP, no_sync around all but the last micro-batch; if `counted`, all-reduces go through Python."""
    images, labels = task.batch(dist.get_rank())
    model = DistributedDataParallel(task.model(), gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    if counted:  # the all-reduces that DDP starts in C++ without a hook
        model.register_comm_hook(None, allreduce_hook)

    def accumulate() -> None:
        # In place, as gradients are views of DDP's buckets.
        optimizer.zero_grad(set_to_none=False)
        parts = zip(images.split(task.micro_batch), labels.split(task.micro_batch), strict=True)
        for k, (x, y) in enumerate(parts, 1):
            with contextlib.nullcontext() if reduce_always or k == task.steps else model.no_sync():
                loss = cross_entropy(model(x), y, reduction="sum")
                # Over the samples of all ranks, and DDP divides by the number of ranks.
                (loss * (task.ranks / (task.ranks * len(images)))).backward()

    return Loop(model, accumulate, optimizer.step)


def windowed(task: Task, model: nn.Module, reduce_always: bool = False) -> Loop:
    """accumexp's window and step, on a `model` that is wrapped for several ranks."""
    images, labels = task.batch(dist.get_rank())
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    loss = nn.CrossEntropyLoss()
    window = Window(model, loss, task.steps, reduce_every_micro_batch=reduce_always, local_loss=True)

    def accumulate() -> None:
        optimizer.zero_grad(set_to_none=not window.sync.keeps_gradients)
        window.backward(images, labels)

    return Loop(model, accumulate, OptimizerStep(window, optimizer), window)


LOOPS: dict[str, Callable[[Task, bool], Loop]] = {
    "hand-written": hand_written,
    "no no_sync": partial(hand_written, reduce_always=True),
    # Its hook is always in Python.
    "accumexp": lambda task, counted: windowed(task, data_parallel(task.model())),
}


def gradient_error(loop: Loop, task: Task) -> float:
    """The largest of the parameters' errors, each relative to its gradient's norm.

    The reference is the gradient of all ranks' samples in one batch, in one process.

    Raises:
        AssertionError: if it is above the tolerance.
    """
    loop.accumulate()
    reference = task.model()
    images, labels = (torch.cat(t) for t in zip(*map(task.batch, range(task.ranks)), strict=True))
    cross_entropy(reference(images), labels).backward()
    error = 0.0
    for parameter, wanted in zip(loop.model.parameters(), reference.parameters(), strict=True):
        gradient = parameter.grad
        assert gradient is not None and wanted.grad is not None
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        error = max(error, float((whole - wanted.grad).norm() / wanted.grad.norm()))
    assert error <= TOLERANCE, f"the gradient is off by {error:.1e} of its norm"
    return error


def traffic(build: Callable[[Task, bool], Loop], task: Task) -> dict[str, int]:
    """One window's all-reduces on this rank: of gradients (one a bucket), others, and the bytes of both.

    Those of gradients are counted by a communication hook around the loop's, all of them by a function that
    replaces `torch.distributed.all_reduce`.
    """
    count = {"gradient_all_reduces": 0, "all_reduces": 0, "bytes": 0}
    register, all_reduce = DistributedDataParallel.register_comm_hook, dist.all_reduce

    def counting_register(model: DistributedDataParallel, state: object, hook: Any) -> None:
        def counting_hook(state: Any, bucket):  # DDP refuses a hook with annotations that are strings
            count["gradient_all_reduces"] += 1
            return hook(state, bucket)

        register(model, state, counting_hook)

    def counting_all_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        count["all_reduces"] += 1
        count["bytes"] += tensor.nbytes
        return all_reduce(tensor, *arguments, **options)

    hooks = patch.object(DistributedDataParallel, "register_comm_hook", counting_register)
    with hooks, patch.object(dist, "all_reduce", counting_all_reduce):
        loop = build(task, True)
        loop.accumulate()  # DDP rebuilds its buckets after its first backward
        count.update(dict.fromkeys(count, 0))
        loop.accumulate()
    count["other_all_reduces"] = count.pop("all_reduces") - count["gradient_all_reduces"]
    return count


def milliseconds(loop: Loop, device: torch.device, updates: int) -> float:
    dist.barrier()
    wait_for(device)
    start = perf_counter()
    for _ in range(updates):
        loop.accumulate()
        loop.step()
    wait_for(device)
    return 1e3 * (perf_counter() - start) / updates


def timings(loops: list[Loop], task: Task, updates: int, repeats: int) -> Rows:
    """Times of an update in ms and their ratios to the first loop's, for each loop.

    They take turns, in a new random order each time, the same on all ranks.
    """
    for loop in loops:
        milliseconds(loop, task.device, updates)
    times = torch.zeros(len(loops), repeats, dtype=torch.float64)

    def take(k: int, repeat: int) -> None:
        times[k, repeat] = milliseconds(loops[k], task.device, updates)

    in_turns(range(len(loops)), range(repeats), take)
    slowest = times.to(task.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)  # an update ends with its last rank
    rows = slowest.tolist()
    return [{"median_ms": statistics.median(row), **ratio_of(row, rows[0]), "ms": row} for row in rows]


def measured(task: Task, updates: int, repeats: int) -> Rows:
    """A row for each loop."""
    loops = [build(task, False) for build in LOOPS.values()]
    rows: Rows = []
    for loop, (name, build) in zip(loops, LOOPS.items(), strict=True):
        row = {"ranks": task.ranks, "steps": task.steps, "loop": name} | traffic(build, task)
        rows.append(row | {"gradient_error": gradient_error(loop, task)})
    times = timings(loops, task, updates, repeats)
    return [row | time for row, time in zip(rows, times, strict=True)]


def measure_rank(
    rank: int, ranks: int, options: argparse.Namespace, folder: Path, measured: Measured
) -> None:
    """Measures on one rank; the first one writes the rows."""
    prepare(options.threads)
    group: dict[str, Any] = {"backend": "gloo", "timeout": timedelta(minutes=5)}
    device = torch.device(options.device)
    if options.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        group.update(backend="nccl", device_id=device)
    store = dist.FileStore(str(folder / "store"), ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(**group, store=store, rank=rank, world_size=ranks)
    width = options.width if options.model == "mlp" else None
    tasks = [Task(device, ranks, steps, options.micro_batch, width) for steps in options.steps]
    rows = [row for task in tasks for row in measured(task, options.updates, options.repeats)]
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # interpreter shutdown sometimes aborts while threads of the group run


def times_of(row: dict[str, Any]) -> list[str]:
    """The last cells of a row in a table of times."""
    quartiles = f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
    return [f"{row['median_ms']:.3f}", f"{row['ratio']:.3f}", quartiles, f"{row['gradient_error']:.1e}"]


def show(report: dict[str, Any]) -> list[Table]:
    headings = "ranks,steps,loop,gradient\nreduces,other\nreduces,bytes,median\nms,ratio,quartiles"
    table = table_of("one window", f"{headings},gradient\noff by")
    for row in report["rows"]:
        names = ("ranks", "steps", "loop", "gradient_all_reduces", "other_all_reduces", "bytes")
        last = row["loop"] == list(LOOPS)[-1]
        table.add_row(*(str(row[name]) for name in names), *times_of(row), end_section=last)
    return [table]


def parser_of(prog: str, description: str | None, ranks: str) -> argparse.ArgumentParser:
    """The options of a benchmark on several ranks."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description)
    parser.add_argument("--ranks", type=numbers, default=ranks, help="how many; %(default)s")
    parser.add_argument("--steps", type=numbers, default="1,2,4,8", help="micro-batches a rank; %(default)s")
    parser.add_argument("--micro-batch", type=int, default=32, help="samples on each rank; %(default)s")
    parser.add_argument("--width", type=int, default=1024, help="of the mlp's two hidden layers; %(default)s")
    parser.add_argument("--updates", type=int, default=10, help="in a repeat; %(default)s")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1, help="of each rank; %(default)s")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="auto: GPUs, if enough")
    output_options(parser)
    return parser


def arguments(parser: argparse.ArgumentParser, given: list[str] | None = None) -> argparse.Namespace:
    options = parser.parse_args(given)
    sizes = (options.micro_batch, options.width, options.updates, options.repeats, options.threads)
    at_least_1(parser, (*options.ranks, *options.steps, *sizes))
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.device_count() >= max(options.ranks) else "cpu"
    return options


def run_rows(options: argparse.Namespace, measured: Measured) -> Rows:
    """The rows of all numbers of ranks, each measured in new processes."""
    rows: Rows = []
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as temporary:
            spawn(measure_rank, (ranks, options, Path(temporary), measured), ranks)
            rows += json.loads(Path(temporary, "rows.json").read_text())
    return rows


def run(options: argparse.Namespace, measured: Measured, show: Show) -> None:
    """Measures on all numbers of ranks, prints the tables, and writes the report if `--json` is given."""
    rows = run_rows(options, measured)
    names = ["model", "micro_batch", "updates", "repeats", "threads"]
    settings = {name: getattr(options, name) for name in names + ["width"] * (options.model == "mlp")}
    here = environment(torch.device(options.device)) | {"threads": options.threads}
    here["backend"] = "nccl" if options.device == "cuda" else "gloo"
    report = {"environment": here, "settings": settings, "rows": rows}
    finish(report, show(report), options.json)


def main() -> None:
    parser = parser_of("benchmarks.ranks", __doc__, ranks="1,2")
    parser.add_argument("--model", choices=["lenet5", "mlp"], default="lenet5")
    run(arguments(parser), measured, show)


if __name__ == "__main__":
    main()
