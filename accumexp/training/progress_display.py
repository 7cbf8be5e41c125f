"""The progress bar of a run, and its metrics in a line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ..config.ranges import require
from ..environment.console import console, print_line
from .callbacks import Callback

if TYPE_CHECKING:
    from .trainer import Trainer

# Columns of a terminal that have room for a long bar, and for the word "epoch".
WIDE, MEDIUM = 100, 70
FORMATS = {
    "train/loss": ("loss", "{:.4f}"),
    "train/accuracy": ("accuracy", "{:.3f}"),
    "eval/accuracy": ("eval accuracy", "{:.3f}"),
    "train/lr": ("lr", "{:.3g}"),
}


MONITOR = "eval/accuracy"


def line(values: Mapping[str, float], monitor: str = MONITOR) -> str:
    """The newest values: the loss, the `monitor` metric, and the others of `FORMATS`."""
    keys = dict.fromkeys(["train/loss", monitor, *FORMATS])
    named = {key: FORMATS.get(key, (key.replace("/", " "), "{:.4g}")) for key in keys if key in values}
    parts = [f"{name} {form.format(values[key])}" for key, (name, form) in named.items()]
    if "perf/update_ms" in values:
        parts.append(f"{1e3 / max(values['perf/update_ms'], 1e-9):.1f} updates/s")
    return "  ".join(parts)


class LossMonitor(Callback):
    """Prints loss, metrics, learning rate and speed in one line every `every` updates.

    Args:
        show: False prints nothing.
        monitor: the metric after the loss.
    """

    shows = True

    def __init__(self, every: int = 100, show: bool | None = None, monitor: str = MONITOR) -> None:
        require("every", every, at_least=0)
        self.every = 0 if show is False else every
        self.monitor = monitor
        self._next = every

    def run_begin(self, trainer: Trainer) -> None:
        self._next = (trainer.progress.update // self.every + 1) * self.every if self.every else math.inf

    def logged(self, trainer: Trainer, values: dict[str, float]) -> None:
        update = trainer.progress.update
        if update >= self._next:
            self._next = (update // self.every + 1) * self.every
            print_line(f"update {update}/{trainer.total_updates}  {line(values, self.monitor)}")


class ProgressBar(Callback):
    """A live bar over the run's updates with the time left, loss, metrics, learning rate and speed.

    What a narrow terminal has no room for is cut at the end of the line.

    Args:
        show: None shows it on a terminal only.
        monitor: the metric after the loss.
    """

    shows = True

    def __init__(self, show: bool | None = None, monitor: str = MONITOR) -> None:
        self.show = console.is_terminal if show is None else show
        self.monitor = monitor
        self._bar: Progress | None = None
        self._task: Any = None

    def run_begin(self, trainer: Trainer) -> None:
        if not self.show:
            return
        whole, cut = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
        self._bar = Progress(
            TextColumn("{task.description}", table_column=whole),
            BarColumn(bar_width=18 if console.width >= WIDE else 6),
            MofNCompleteColumn(table_column=whole),
            TimeRemainingColumn(compact=True, table_column=whole),
            TextColumn("{task.fields[values]}", table_column=cut),
            expand=True,
            console=console,
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(
            "training", total=trainer.total_updates, completed=trainer.progress.update, values=""
        )
        self._bar.start()

    def epoch_begin(self, trainer: Trainer) -> None:
        if self._bar:
            epoch = min(trainer.progress.epoch + 1, trainer.options.epochs)
            word = "epoch " if console.width >= MEDIUM else ""
            text = f"{trainer.title}{word}{epoch}/{trainer.options.epochs}"
            self._bar.update(self._task, description=text)

    def logged(self, trainer: Trainer, values: dict[str, float]) -> None:
        if self._bar:
            self._bar.update(self._task, completed=trainer.progress.update, values=line(values, self.monitor))

    def run_end(self, trainer: Trainer) -> None:
        if self._bar:
            self._bar.update(self._task, completed=trainer.progress.update)
            self._bar.stop()
            self._bar = None
