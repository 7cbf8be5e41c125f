"""Peak memory of an update of a fixed batch, by steps, beside its prediction and the peers' peaks.

python -m benchmarks.memory --model lenet5,resnet18 --batch 256 --steps 1,2,4,8,16 --json memory.json
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from accumexp.environment.device import pick_device, wait_for
from accumexp.environment.memory import MIB, reset_peak_memory

from .loops import built, saved_bytes, timed
from .measure import (
    Rows,
    at_least_1,
    check_names,
    console,
    device_options,
    environment,
    finish,
    not_installed,
    numbers,
    output_options,
    prepare,
    say,
    table_of,
    words,
)
from .prediction import predicted
from .tasks import MODELS, Task
from .window import LOOPS, PACKAGES

COMPARED = ("hand-written", "accelerate", "fabric", "lightning", "transformers", "accumexp")
UPDATES = 2  # the first makes gradients and momentum, the second holds them while it computes


def tensor_peak(device: torch.device, work: Callable[[], None]) -> int:
    """Peak bytes of tensors during `work`, beyond those that were allocated before."""
    gc.collect()
    if device.type == "cuda":
        wait_for(device)
        before = torch.cuda.memory_allocated(device)
        reset_peak_memory(device)
        work()
        wait_for(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    inner: Any = profiler.profiler
    events = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def measure_here(name: str, task: Task, threads: int | None) -> dict[str, Any]:
    """A loop's figures in bytes, measured in a new process; or why it was skipped.

    The process's resident memory is measured first, without the profiler, which needs memory too.
    """
    prepare(threads)
    kind = LOOPS[name]
    try:
        made = built(
            kind, Task(task.model, task.device, 1, 1, 1)
        )  # for the imports, and for what libraries allocate once
        timed(made)
        made.close()
        del made
        task.dataset()
        gc.collect()
        reset_peak_memory(torch.device("cpu"))
        before, started = _status("VmRSS"), _status("VmHWM")
        loop = built(kind, task)
        for _ in range(UPDATES):
            timed(loop)
        highest = _status("VmHWM")
        resident = None
        # A peak that could not be reset is that of the imports.
        if before and started and highest and started <= 1.02 * before:
            resident = highest - before
        saved = saved_bytes(loop)
        loop.close()
        del loop
        kept: list[Any] = []

        def work() -> None:
            kept.append(built(kind, task))
            for _ in range(UPDATES):
                timed(kept[0])

        peak = tensor_peak(task.device, work)
        kept[0].close()
    except ModuleNotFoundError as error:
        return {"skipped": not_installed(error)}
    return {"peak": peak, "resident": resident, "saved": saved}


def _status(key: str) -> int | None:
    """Bytes of this process in Linux's proc(5) status; None on other systems.

    getrusage's peak is inherited from the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith(f"{key}:")]
    return 1024 * kibibytes[0] if kibibytes else None


def alone(name: str, task: Task, threads: int | None) -> dict[str, Any]:
    """`measure_here` in a new process."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler logs every missing GPU
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure_here, name, task, threads).result()


def show(report: dict[str, Any]) -> list[Table]:
    headings = "model,steps,loop,saved\nMiB,peak of\ntensors MiB,"
    headings += "predicted\nMiB,peak over\npredicted,process\nMiB"
    table = table_of(
        f"peak of memory, {report['settings']['batch']} samples an update", headings, "loop,model"
    )
    rows = report["rows"]
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = [f"{row['saved_mib']:.2f}", f"{row['peak_mib']:.2f}", f"{row['predicted_mib']:.2f}"]
        cells += [f"{row['peak_mib'] / row['predicted_mib']:.3f}"]
        cells += ["-" if row["process_mib"] is None else f"{row['process_mib']:.1f}"]
        last = following is None or following["steps"] != row["steps"]
        table.add_row(row["model"], str(row["steps"]), row["loop"], *cells, end_section=last)
    return [table]


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument(
        "--model", type=words, default="lenet5,resnet18", help=f"of {', '.join(MODELS)}; %(default)s"
    )
    parser.add_argument("--batch", type=int, default=256, help="samples an update; %(default)s")
    parser.add_argument(
        "--steps", type=numbers, default="1,2,4,8,16", help="that divide the batch; %(default)s"
    )
    device_options(parser)
    parser.add_argument("--only", type=words, default=",".join(COMPARED), help="loops; %(default)s")
    output_options(parser, picture=True)
    options = parser.parse_args(given)
    check_names(parser, "--only", options.only, LOOPS)
    check_names(parser, "--model", options.model, MODELS)
    at_least_1(parser, (options.batch, *options.steps, options.threads))
    if uneven := [steps for steps in options.steps if options.batch % steps]:
        parser.error(f"--steps: {', '.join(map(str, uneven))} do not divide {options.batch}")
    return options


def report_of(options: argparse.Namespace) -> dict[str, Any]:
    device = pick_device(options.device)
    rows: Rows = []
    skipped: dict[str, str] = {}
    sizes = [(model, steps) for model in options.model for steps in options.steps]
    for model, steps in track(sizes, "training", console=console, transient=True):
        task = Task(model, device, options.batch // steps, steps, options.batch)
        expected = predicted(task)
        for name in options.only:
            measured: dict[str, Any] = {"skipped": skipped.get(name)}
            if name not in skipped:
                measured = alone(name, task, options.threads)
            if "skipped" in measured:
                if name not in skipped:
                    say(f"{name} skipped: {measured['skipped']}")
                skipped[name] = measured["skipped"]
                continue
            row = {"model": model, "steps": steps, "micro_batch": task.micro_batch, "loop": name}
            row |= {"saved_mib": measured["saved"] / MIB, "peak_mib": measured["peak"] / MIB}
            row |= {"predicted_mib": expected.total / MIB, "predicted_bytes": vars(expected)}
            row |= {"process_mib": None if measured["resident"] is None else measured["resident"] / MIB}
            rows.append(row)
    settings = {"model": options.model, "batch": options.batch, "steps": options.steps, "updates": UPDATES}
    here = environment(device, *PACKAGES)
    return {"environment": here, "settings": settings, "rows": rows, "skipped": skipped}


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    prepare(options.threads)
    report = report_of(options)
    if not report["rows"]:
        raise SystemExit("error: no loop was measured")
    finish(report, show(report), options.json)
    if options.picture:
        from .pictures import memory_picture

        memory_picture(report, options.picture)


if __name__ == "__main__":
    main()
