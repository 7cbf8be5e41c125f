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
from ..environment.console import amount, console, show_values
from ..environment.device import device_name
from ..environment.memory import MIB
from ..errors import UsageError
from .picture import draw
from .planner import Planner, Stage
from .points import Frontier, Point
from .trial_run import trial_run

# Timed updates of a point: as many as fit into so many seconds, of these two at most and at least.
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
        found = measure_frontier(config, given, stage, points_of)
    _show(found)
    folder.mkdir(parents=True, exist_ok=True)
    table, picture = folder / RESULT, folder / PICTURE
    table.write_text(json.dumps(asdict(found), indent=2))
    draw(found, picture)
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
    """The point at `steps`, tried unless it is predicted not to fit."""
    predicted = planner.predicted(steps)
    if predicted > planner.limit.bytes:
        trial = planner.trial
        return Point(steps, micro_batch(trial.data.batch_size, steps, trial.ranks), predicted, False)
    return planner.tried(steps)


def _seconds(planner: Planner, steps: int) -> float:
    """Seconds of an update, of which every point takes the same ones."""
    planner.stage(f"timing {steps} micro-batches")
    least, most = TIMED
    once = planner.trial.seconds(steps, 1)
    return planner.trial.seconds(steps, max(least, min(most, int(TIMED_SECONDS / max(once, 1e-6)))))


def _show(found: Frontier) -> None:
    over = f" over {found.ranks} ranks" if found.ranks > 1 else ""
    console.print(
        f"{found.name}, updates of {found.batch_size} samples{over}, on {found.device}, "
        f"at most {found.limit}",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 1), collapse_padding=True)
    for title in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for point in found.points:
        table.add_row(*_cells(point, found), style="bold" if point == found.chosen else "")
    console.print(table)
    console.print()
    if found.chosen:
        point = found.chosen
        console.print(
            f"accum.steps={point.steps}: the largest micro-batch that fits, {point.micro_batch} samples",
            style="bold green",
            highlight=False,
            soft_wrap=True,
        )
        made_of = ", ".join(f"{name} {amount(size)}" for name, size in found.parts.items())
        console.print(f"made of {made_of}", highlight=False, soft_wrap=True)
    else:
        console.print(found.refused, style="bold red", highlight=False, soft_wrap=True)
    for point in found.points:
        if point.trouble:
            said = f"micro-batches of {point.micro_batch} do not run: {point.trouble}"
            console.print(said, style="yellow", highlight=False, soft_wrap=True, markup=False)
    console.print(f"an evaluation needs {amount(found.evaluation)}", highlight=False, soft_wrap=True)
    if found.ranks > 1:
        said = "one rank's part, alone on this machine: without the time that ranks wait for each other"
        console.print(said, style="dim")


def _cells(point: Point, found: Frontier) -> list[str]:
    cells = [str(point.micro_batch), str(point.steps), f"{point.predicted / MIB:,.1f} MiB"]
    if point.measured is None:
        cells += ["", ""]
    else:
        error = point.predicted / point.measured - 1
        cells += [f"{point.measured / MIB:,.1f} MiB", f"{error:+.1%}"]
    if point.seconds is None:
        cells += ["", ""]
    else:
        cells += [f"{1e3 * point.seconds:,.2f}", f"{found.samples / point.seconds:,.0f}"]
    if point == found.chosen:
        said = "[green]chosen[/]"
    elif point.fits:
        said = ""
    else:
        said = "[red]does not fit[/]" if not point.trouble else "[red]does not run[/]"
    return [*cells, said]


@contextmanager
def _progress() -> Iterator[tuple[Stage, Any]]:
    """(What says what is measured, what counts the points) on a terminal; elsewhere nothing is shown."""
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
