"""The progress bar of a run, and its metrics in a line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config.ranges import require
from ..environment.console import console, print_line
from .callbacks import Callback

if TYPE_CHECKING:
    from .trainer import Trainer

FORMATS = {
    "train/loss": ("loss", "{:.4f}"),
    "train/accuracy": ("accuracy", "{:.3f}"),
    "eval/accuracy": ("eval accuracy", "{:.3f}"),
    "train/lr": ("lr", "{:.3g}"),
}


def line(values: Mapping[str, float]) -> str:
    """The newest values in the order and form of `FORMATS`."""
    parts = [f"{name} {form.format(values[key])}" for key, (name, form) in FORMATS.items() if key in values]
    if "perf/update_ms" in values:
        parts.append(f"{1e3 / max(values['perf/update_ms'], 1e-9):.1f} updates/s")
    return "  ".join(parts)


class LossMonitor(Callback):
    """Prints loss, metrics, learning rate and speed in one line every `every` updates."""

    shows = True

    def __init__(self, every: int = 100) -> None:
        require("every", every, at_least=0)
        self.every = every
        self._next = every

    def run_begin(self, trainer: Trainer) -> None:
        self._next = (trainer.progress.update // self.every + 1) * self.every if self.every else math.inf

    def logged(self, trainer: Trainer, values: dict[str, float]) -> None:
        update = trainer.progress.update
        if update >= self._next:
            self._next = (update // self.every + 1) * self.every
            print_line(f"update {update}/{trainer.total_updates}  {line(values)}")


class ProgressBar(Callback):
    """A live bar over the run's updates with loss, accuracy, learning rate and speed.

    Args:
        show: None shows it on a terminal only.
    """

    shows = True

    def __init__(self, show: bool | None = None) -> None:
        self.show = console.is_terminal if show is None else show
        self._bar: Progress | None = None
        self._task: Any = None

    def run_begin(self, trainer: Trainer) -> None:
        if not self.show:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
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
            self._bar.update(self._task, description=f"{trainer.title}epoch {epoch}/{trainer.options.epochs}")

    def logged(self, trainer: Trainer, values: dict[str, float]) -> None:
        if self._bar:
            self._bar.update(self._task, completed=trainer.progress.update, values=line(values))

    def run_end(self, trainer: Trainer) -> None:
        if self._bar:
            self._bar.update(self._task, completed=trainer.progress.update)
            self._bar.stop()
            self._bar = None
