"""The frontier of an experiment: what every split of its batch needs and takes, printed, drawn and kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..config.schema import Config
from ..config.sizes import AUTO, micro_batch
from ..environment.console import amount, console, print_line, show_values
from ..environment.device import device_name
from ..environment.memory import MIB
from ..errors import UsageError
from .picture import draw
from .planner import Planner, Stage
from .points import Frontier, Point
from .trial_run import trial_run

# Timed updates of a point: as many as fit into TIMED_SECONDS, from 3 to 20.
TIMED = (3, 20)
TIMED_SECONDS = 2.0
COLUMNS = ("micro-batch", "accum.steps", "predicted", "measured", "error", "ms/update", "samples/s")
RESULT, PICTURE = "plan.json", "plan.png"


def plan(config: Config, folder: Path) -> None:
    """Measures the frontier of `config`, prints it, and writes `plan.json` and `plan.png` into `folder`.

    Raises:
        UsageError: if the experiment cannot be built, or not even a micro-batch of one sample fits.
    """
    given = None if config.accum.steps == AUTO else int(config.accum.steps or 1)
    config = replace(config, accum=replace(config.accum, steps=AUTO, micro_batch_size=None))
    with _progress() as (stage, points_of):
        frontier = measure_frontier(config, given, stage, points_of)
    _show(frontier)
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / RESULT, folder / PICTURE
    table.write_text(json.dumps(asdict(frontier), indent=2))
    draw(frontier, picture)
    console.print()
    show_values("kept", {"table": table, "picture": picture})


def measure_frontier(config: Config, given: int | None, stage: Stage, points_of: Any) -> Frontier:
    """The frontier of a configuration with `accum.steps=auto`; `given` steps are a point too."""
    with trial_run(config) as trial:
        planner = Planner(trial, stage)
        batch, ranks = trial.data.batch_size, trial.ranks
        chosen, refused = None, None
        try:
            chosen = planner.choose()
        except UsageError as error:
            refused = str(error)
        steps = {1 << k for k in range((batch // ranks).bit_length())} | {batch // ranks}
        steps |= {given or 1} | ({chosen.steps} if chosen else set())
        points = []
        for number in points_of(sorted(steps)):
            point = chosen if chosen and chosen.steps == number else _point(planner, number)
            if point.fits:
                point = replace(point, seconds=_seconds(planner, number))
            chosen = point if chosen and chosen.steps == number else chosen
            points.append(point)
        return Frontier(
            config.model["_target_"].rpartition(".")[2],
            f"{trial.device} ({device_name(trial.device)})",
            batch,
            min(batch, trial.data.samples),
            ranks,
            planner.limit,
            points,
            chosen,
            refused,
            planner.evaluation(trial.data.evaluated),
            planner.parts(chosen) if chosen else {},
        )


def _point(planner: Planner, steps: int) -> Point:
    """The point at `steps`, measured unless it is predicted not to fit."""
    predicted = planner.predicted_peak(steps)
    if predicted > planner.limit.bytes:
        trial = planner.trial
        return Point(steps, micro_batch(trial.data.batch_size, steps, trial.ranks), predicted, False)
    return planner.measure(steps)


def _seconds(planner: Planner, steps: int) -> float:
    """Median seconds of an update."""
    planner.stage(f"timing {steps} micro-batches")
    least, most = TIMED
    once = planner.trial.seconds(steps, 1)
    return planner.trial.seconds(steps, max(least, min(most, int(TIMED_SECONDS / max(once, 1e-6)))))


def _show(frontier: Frontier) -> None:
    over = f" over {frontier.ranks} ranks" if frontier.ranks > 1 else ""
    batch = f"updates of {frontier.batch_size} samples{over}"
    print_line(f"{frontier.name}, {batch}, on {frontier.device}, at most {frontier.limit}")
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 1), collapse_padding=True)
    for title in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for point in frontier.points:
        table.add_row(*_cells(point, frontier), style="bold" if point == frontier.chosen else "")
    console.print(table)
    console.print()
    if frontier.chosen:
        point = frontier.chosen
        chosen = f"accum.steps={point.steps}: the largest micro-batch that fits, {point.micro_batch} samples"
        print_line(chosen, style="bold green")
        print_line("made of " + ", ".join(f"{name} {amount(size)}" for name, size in frontier.parts.items()))
    else:
        print_line(frontier.refused, style="bold red")
    for point in frontier.points:
        if point.trouble:
            trouble = f"micro-batches of {point.micro_batch} do not run: {point.trouble}"
            print_line(trouble, style="yellow", markup=False)
    print_line(f"an evaluation needs {amount(frontier.evaluation)}")
    if frontier.ranks > 1:
        note = "one rank's part, alone on this machine: without the time that ranks wait for each other"
        console.print(note, style="dim")


def _cells(point: Point, frontier: Frontier) -> list[str]:
    cells = [str(point.micro_batch), str(point.steps), f"{point.predicted / MIB:,.1f} MiB"]
    if point.measured is None:
        cells += ["", ""]
    else:
        error = point.predicted / point.measured - 1
        cells += [f"{point.measured / MIB:,.1f} MiB", f"{error:+.1%}"]
    if point.seconds is None:
        cells += ["", ""]
    else:
        cells += [f"{1e3 * point.seconds:,.2f}", f"{frontier.samples / point.seconds:,.0f}"]
    if point == frontier.chosen:
        return [*cells, "[green]chosen[/]"]
    if point.fits:
        return [*cells, ""]
    return [*cells, "[red]does not run[/]" if point.trouble else "[red]does not fit[/]"]


@contextmanager
def _progress() -> Iterator[tuple[Stage, Any]]:
    """Shows a bar on a terminal; yields a function that sets its text, and one that counts the points."""
    with Progress(
        TextColumn("planning"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("", total=None)

        def points_of(steps: list[int]) -> Iterator[int]:
            bar.update(task, total=len(steps))
            for number in steps:
                yield number
                bar.advance(task)

        yield lambda text: bar.update(task, description=text), points_of
