"""How cost grows with steps, parameters, ranks and logged points.

python -m benchmarks.growth --json growth.json --picture growth.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.progress import track
from rich.table import Table

from accumexp.config.schema import TrackingConfig
from accumexp.environment.device import pick_device
from accumexp.tracking import MLflowTracker, Store
from accumexp.tracking.record import RunRecord
from accumexp.tracking.run_folder import RunFolder, RunStatus

from . import ranks
from .accumexp_loop import Accumexp
from .cell import measured_together, one_micro_batch
from .loops import HandWritten, Loop
from .measure import (
    Rows,
    at_least_1,
    check_names,
    console,
    device_options,
    environment,
    finish,
    numbers,
    output_options,
    prepare,
    table_of,
    words,
)
from .tasks import Task

PANELS = ("steps", "parameters", "ranks", "points")
KINDS: list[type[Loop]] = [HandWritten, Accumexp]
# The metrics of a logged update.
VALUES = ("train/loss", "train/lr", "train/grad_norm", "train/accuracy", "perf/update_ms")
MOST_STEPS, MOST_MS = 66, 0.15  # t(64) over t(1), and ms a point: the limits that the project claims


def by_steps(options: argparse.Namespace, device: torch.device) -> Rows:
    """Windows of LeNet-5, by steps; all take turns, as their times are compared."""
    sizes = [(steps, options.micro_batch * steps) for steps in options.steps]
    tasks = [Task("lenet5", device, options.micro_batch, steps, samples) for steps, samples in sizes]
    one = one_micro_batch(tasks[0])
    with console.status("steps"):
        return measured_together(KINDS, [(task, one) for task in tasks], options.seconds)


def by_parameters(options: argparse.Namespace, device: torch.device) -> Rows:
    """Windows of four micro-batches of an MLP, by its number of parameters; all widths take turns."""
    batch = 4 * options.micro_batch
    tasks = [Task("mlp", device, options.micro_batch, 4, batch, width=width) for width in options.widths]
    counts = [sum(parameter.numel() for parameter in task.build().parameters()) for task in tasks]
    with console.status("parameters"):
        rows = measured_together(KINDS, [(task, one_micro_batch(task)) for task in tasks], options.seconds)
    return [
        {"width": width, "parameters": count} | row
        for width, count, row in zip(options.widths, counts, rows, strict=True)
    ]


def by_ranks(options: argparse.Namespace) -> Rows:
    """Windows of four micro-batches of LeNet-5 on each rank, by ranks."""
    given = [
        "--ranks",
        ",".join(map(str, options.ranks)),
        "--steps=4",
        f"--micro-batch={options.micro_batch}",
    ]
    given += [f"--repeats={options.repeats}", "--device", "cpu" if options.device == "cpu" else "auto"]
    parser = ranks.parser_of("benchmarks.ranks", None, ranks="1,2")
    parser.set_defaults(model="lenet5")
    return ranks.run_rows(ranks.arguments(parser, given), ranks.measured)


def by_points(options: argparse.Namespace) -> Rows:
    """Points written to a run's journal and to MLflow on SQLite, from the first until the run is closed."""
    rows: Rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", system_metrics=False)
        store = Store(config)
        for points in track(options.points, "points", console=console, transient=True):
            run_id = store.create_run(f"{points} points", {})
            run_folder = Path(folder, run_id)
            run_folder.mkdir()
            record = RunRecord(RunFolder(run_folder))
            record.tracker = MLflowTracker(store, run_id, config)
            start, left, update = perf_counter(), points, 0
            while left:
                update += 1
                values = {name: 1 / update for name in VALUES[: min(left, len(VALUES))]}
                record.record(update, values, publish=True)
                left -= len(values)
            record.close(RunStatus.FINISHED)
            seconds = perf_counter() - start
            kept = sum(len(store.client.get_metric_history(run_id, name)) for name in VALUES)
            row = {"points": points, "kept": kept, "seconds": seconds}
            rows.append(row | {"ms_a_point": 1e3 * seconds / points})
    return rows


def show(report: dict[str, Any]) -> list[Table]:
    tables: list[Table] = []
    for panel, key in (("steps", "steps"), ("parameters", "parameters")):
        if panel in report:
            table = table_of(
                f"a window, by {panel}", f"{panel},by hand\nms,accumexp\nms,ratio,quartiles,t / first t"
            )
            for row in report[panel]:
                by_hand, ours = (row["loops"][kind.name] for kind in KINDS)
                cells = [f"{by_hand['median_ms']:.3f}", f"{ours['median_ms']:.3f}", f"{ours['ratio']:.3f}"]
                cells += [f"{ours['ratio_low']:.3f} to {ours['ratio_high']:.3f}"]
                table.add_row(f"{row[key]:,}", *cells, f"{ours['times']:.2f}")
            tables.append(table)
    if "ranks" in report:
        tables += ranks.show({"rows": report["ranks"]})
    if "points" in report:
        table = table_of(f"logged points, at most {MOST_MS} ms each", "points,found in\nMLflow,s,ms a point")
        for row in report["points"]:
            cells = (
                f"{row['points']:,}",
                f"{row['kept']:,}",
                f"{row['seconds']:.2f}",
                f"{row['ms_a_point']:.4f}",
            )
            table.add_row(*cells)
        tables.append(table)
    return tables


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--only", type=words, default=",".join(PANELS), help="panels; %(default)s")
    parser.add_argument("--steps", type=numbers, default="1,2,4,8,16,32,64", help="%(default)s")
    parser.add_argument(
        "--widths", type=numbers, default="32,128,512,1024,2048", help="of an MLP; %(default)s"
    )
    parser.add_argument("--ranks", type=numbers, default="1,2", help="%(default)s")
    parser.add_argument("--points", type=numbers, default="1000,10000,100000", help="%(default)s")
    parser.add_argument("--micro-batch", type=int, default=32, help="%(default)s")
    parser.add_argument("--seconds", type=float, default=10.0, help="a loop and size; %(default)s")
    parser.add_argument("--repeats", type=int, default=30, help="on ranks; %(default)s")
    device_options(parser)
    output_options(parser, picture=True)
    options = parser.parse_args(given)
    check_names(parser, "--only", options.only, PANELS)
    sizes = (*options.steps, *options.widths, *options.ranks, *options.points)
    at_least_1(parser, (*sizes, options.micro_batch, options.repeats, options.threads))
    return options


def report_of(options: argparse.Namespace) -> dict[str, Any]:
    device = pick_device(options.device)
    names = ("only", "steps", "widths", "ranks", "points", "micro_batch", "seconds", "repeats")
    settings = {name: getattr(options, name) for name in names}
    report: dict[str, Any] = {"environment": environment(device, "mlflow"), "settings": settings}
    # Ranks first: processes are started before this one has threads.
    if "ranks" in options.only:
        report["ranks"] = by_ranks(options)
    if "points" in options.only:
        report["points"] = by_points(options)
    if "steps" in options.only:
        report["steps"] = by_steps(options, device)
    if "parameters" in options.only:
        report["parameters"] = by_parameters(options, device)
    refused = [
        why
        for panel in ("steps", "parameters")
        for row in report.get(panel, [])
        for why in row["refused"].values()
    ]
    if refused:
        raise SystemExit(f"error: {refused[0]}")
    return report


def conclude(report: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if rows := report.get("steps"):
        first, last = rows[0], rows[-1]
        for kind in KINDS:
            times = last["loops"][kind.name]["times"]
            lines.append(f"{kind.name}: t({last['steps']}) is {times:.2f} t({first['steps']})")
        if (first["steps"], last["steps"]) == (1, 64):
            lines[-1] += f", at most {MOST_STEPS} is claimed"
    if rows := report.get("points"):
        lines.append(f"{rows[-1]['points']:,} points: {rows[-1]['ms_a_point']:.4f} ms a point")
    return lines


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    prepare(options.threads)
    report = report_of(options)
    finish(report, show(report), options.json)
    for line in conclude(report):
        console.print(line, highlight=False)
    if options.picture:
        from .pictures import growth_picture

        growth_picture(report, options.picture)


if __name__ == "__main__":
    main()
