"""Times one update of accumexp, of loops written by hand and of other trainers, in turns, at many sizes.

python -m benchmarks.window --model lenet5 --micro-batch 8,32,128,512 --steps 1,4,16,64 --json window.json
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from rich.progress import track
from rich.table import Table

from accumexp.environment.device import pick_device

from .accumexp_loop import Accumexp
from .cell import OneMicroBatch, measured, one_micro_batch
from .loops import Fused, HandWritten, HandWrittenLoader, Loop, SingleBatch
from .measure import (
    at_least_1,
    check_names,
    console,
    device_options,
    environment,
    finish,
    numbers,
    output_options,
    prepare,
    say,
    table_of,
    words,
)
from .peers import PEERS
from .tasks import Task

MODELS = ("lenet5", "resnet18", "bert")
LOOPS: dict[str, type[Loop]] = {
    kind.name: kind for kind in (HandWritten, Fused, SingleBatch, HandWrittenLoader, *PEERS, Accumexp)
}
PACKAGES = ("accelerate", "lightning", "transformers", "mlflow", "torchvision")
SHORT = {
    "hand-written fused": "fused",
    "single-batch": "single\nbatch",
    "dataloader": "data-\nloader",
    "accelerate": "accel-\nerate",
    "fabric": "fabric",
    "lightning": "light-\nning",
    "transformers": "trans-\nformers",
    "accumexp": "accum-\nexp",
}
GOAL = 1.02  # of the hand-written loop's time


def flags(cell: dict[str, Any]) -> list[str]:
    """How a cell misses the goal: above its ratio to the hand-written loop, or not ahead of a peer."""
    rows = cell["loops"]
    if Accumexp.name not in rows:
        return []
    ratio = rows[Accumexp.name]["ratio"]
    missed = [f"above {GOAL}"] if ratio > GOAL else []
    ahead = [kind.name for kind in PEERS if kind.name in rows and rows[kind.name]["ratio"] <= ratio]
    return missed + [f"behind {name}" for name in ahead]


def growth(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By model, micro-batch and loop: t(most steps) / t(1), where both were measured."""
    rows: list[dict[str, Any]] = []
    for model, micro in dict.fromkeys((cell["model"], cell["micro_batch"]) for cell in cells):
        by_steps = {c["steps"]: c for c in cells if (c["model"], c["micro_batch"]) == (model, micro)}
        most = max(by_steps)
        if 1 not in by_steps or most == 1:
            continue
        for name in (HandWritten.name, Accumexp.name):
            if all(name in by_steps[steps]["loops"] for steps in (1, most)):
                first, last = (by_steps[steps]["loops"][name]["median_ms"] for steps in (1, most))
                rows.append({"model": model, "micro_batch": micro, "loop": name})
                rows[-1] |= {"steps": most, "times": last / first}
    return rows


def show(report: dict[str, Any]) -> list[Table]:
    """A table of one cell in detail, or one a model of the ratios in all its cells."""
    cells = report["cells"]
    if len(cells) == 1:
        return [_detail(cells[0])]
    tables: list[Table] = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        cells_of = [cell for cell in cells if cell["model"] == model]
        names = [name for name in LOOPS if any(name in cell["loops"] for cell in cells_of)]
        headings = ",".join(
            ["micro\nbatch", "steps", "by hand\nms", *(SHORT[name] for name in names[1:]), "misses"]
        )
        table = table_of(f"{model}: time of an update over the hand-written loop's", headings, left="misses")
        for cell in cells_of:
            rows = cell["loops"]
            ratios = [f"{rows[name]['ratio']:.3f}" if name in rows else "-" for name in names[1:]]
            by_hand = f"{rows[HandWritten.name]['median_ms']:.2f}"
            last = cell["micro_batch"] != next(
                (c["micro_batch"] for c in cells_of[cells_of.index(cell) + 1 :]), cell["micro_batch"]
            )
            missed = "\n".join(cell["misses"])
            row = (str(cell["micro_batch"]), str(cell["steps"]), by_hand, *ratios, missed)
            table.add_row(*row, end_section=last)
        tables.append(table)
    if report["growth"]:
        table = table_of(
            "time of a window over that of one micro-batch", "model,micro-\nbatch,loop,steps,times"
        )
        for row in report["growth"]:
            cells_of = (str(row[key]) for key in ("model", "micro_batch", "loop", "steps"))
            table.add_row(*cells_of, f"{row['times']:.2f}")
        tables.append(table)
    return tables


def _detail(cell: dict[str, Any]) -> Table:
    title = f"{cell['model']}: one update of {cell['steps']} x {cell['micro_batch']}"
    headings = "loop,median\nms,min\nms,ratio,quartiles,saved\nMiB,gradient\noff by"
    table = table_of(title, headings)
    for name, row in cell["loops"].items():
        spread = f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        numbers_of = [f"{row['median_ms']:.3f}", f"{row['min_ms']:.3f}", f"{row['ratio']:.3f}", spread]
        table.add_row(name, *numbers_of, f"{row['saved_mib']:.3f}", f"{row['gradient_error']:.1e}")
    return table


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.window", description=__doc__)
    parser.add_argument("--model", type=words, default="lenet5", help=f"of {', '.join(MODELS)}; %(default)s")
    parser.add_argument("--micro-batch", type=numbers, default="32", help="samples, a list; %(default)s")
    parser.add_argument("--steps", type=numbers, default="4", help="micro-batches, a list; %(default)s")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each loop in each cell; %(default)s")
    parser.add_argument("--rounds", type=int, help="without it as many as fit into --seconds")
    parser.add_argument("--updates", type=int, help="a round, rounded up to whole epochs of the samples")
    parser.add_argument(
        "--cell-limit", type=float, default=5.0, help="leave out cells of longer updates, in s; %(default)s"
    )
    device_options(parser)
    parser.add_argument("--deterministic", action="store_true", help="reproducible kernels in all loops")
    parser.add_argument("--only", type=words, default=",".join(LOOPS), help="loops; %(default)s")
    output_options(parser, picture=True)
    options = parser.parse_args(given)
    options.only = [HandWritten.name, *(name for name in options.only if name != HandWritten.name)]
    check_names(parser, "--only", options.only, LOOPS)
    check_names(parser, "--model", options.model, MODELS)
    at_least_1(
        parser, (options.rounds, options.updates, *options.micro_batch, *options.steps, options.threads)
    )
    if not (options.seconds > 0 and options.cell_limit > 0):
        parser.error("--seconds and --cell-limit are above 0")
    return options


def report_of(options: argparse.Namespace) -> dict[str, Any]:
    """Measures every cell that is not too large."""
    device = pick_device(options.device)
    kinds = [LOOPS[name] for name in options.only]
    sizes = [(m, b, s) for m in options.model for b in options.micro_batch for s in options.steps]
    cells: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    first: dict[tuple[str, int], OneMicroBatch] = {}
    printed: set[str] = set()
    for model, micro, steps in track(sizes, "training", console=console, transient=True):
        task = Task(model, device, micro, steps, micro * steps, options.deterministic)
        if (model, micro) not in first:
            first[model, micro] = one_micro_batch(task)
        update = steps * first[model, micro].seconds
        if update > options.cell_limit:
            left_out.append({"model": model, "micro_batch": micro, "steps": steps, "estimate_s": update})
            say(f"{model}, {steps} x {micro} left out: an update takes about {update:.1f} s")
            continue
        cell = measured(kinds, task, options.seconds, first[model, micro], options.rounds, options.updates)
        for name, reason in cell["skipped"].items():
            if (line := f"{name} skipped: {reason}") not in printed:
                printed.add(line)
                say(f"{model}, {steps} x {micro}: {line}")
        for reason in cell["refused"].values():
            say(f"{model}, {steps} x {micro}: refused {reason}")
        cells.append(cell | {"misses": flags(cell)})
        if options.json:  # kept if a later cell ends the command
            options.json.write_text(json.dumps({"cells": cells, "left_out": left_out}) + "\n")
    names = ("model", "micro_batch", "steps", "seconds", "rounds", "updates", "cell_limit", "deterministic")
    settings = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    report = {"environment": environment(device, *PACKAGES), "settings": settings}
    return report | {"cells": cells, "left_out": left_out, "growth": growth(cells)}


def conclude(report: dict[str, Any]) -> str:
    """Whether the goal is reached, in one line."""
    cells = [cell for cell in report["cells"] if Accumexp.name in cell["loops"]]
    if not cells:
        return "accumexp was not measured"
    ratios = [cell["loops"][Accumexp.name]["ratio"] for cell in cells]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    within = sum(not any(m.startswith("above") for m in cell["misses"]) for cell in cells)
    ahead = sum(not any(m.startswith("behind") for m in cell["misses"]) for cell in cells)
    line = f"accumexp: {min(ratios):.3f} to {max(ratios):.3f} of the hand-written loop"
    line += f", geometric mean {mean:.3f}"
    line += f"; at most {GOAL} in {within} of {len(cells)} cells"
    peers = [kind.name for kind in PEERS if any(kind.name in cell["loops"] for cell in cells)]
    line += f", ahead of {', '.join(peers)} in {ahead}" if peers else ""
    left = len(report["left_out"])
    return f"{line}; {left} cells left out" if left else line


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    prepare(options.threads)
    report = report_of(options)
    if not report["cells"]:
        raise SystemExit("error: every cell is left out; raise --cell-limit")
    finish(report, show(report), options.json)
    say(conclude(report))
    if options.picture:
        from .pictures import window_picture

        window_picture(report, Path(options.picture))
    if any(cell["refused"] for cell in report["cells"]):
        raise SystemExit("error: a loop was refused, its gradient is not the hand-written loop's")


if __name__ == "__main__":
    main()
