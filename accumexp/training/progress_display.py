"""What a person sees of a run in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from ..environment.console import console as console
from ..environment.console import show_values as show_values
from .callbacks import Callback

if TYPE_CHECKING:
    from .trainer import Trainer

SHOWN = {
    "train/loss": ("loss", "{:.4f}"),
    "train/accuracy": ("accuracy", "{:.3f}"),
    "eval/accuracy": ("eval accuracy", "{:.3f}"),
    "train/lr": ("lr", "{:.3g}"),
}


def line(values: Mapping[str, float]) -> str:
    """The newest values in the order and form of `SHOWN`."""
    parts = [f"{name} {form.format(values[key])}" for key, (name, form) in SHOWN.items() if key in values]
    if "perf/update_ms" in values:
        parts.append(f"{1e3 / max(values['perf/update_ms'], 1e-9):.1f} updates/s")
    return "  ".join(parts)


class Progress(Callback):
    """A live bar over the run's updates with loss, accuracy, learning rate and speed.

    Args:
        show: None shows it on a terminal only.
    """

    def __init__(self, show: bool | None = None) -> None:
        self.show = console.is_terminal if show is None else show
        self.title = ""  # of the job that the bar is of
        self._bar: RichProgress | None = None
        self._task: Any = None

    def run_begin(self, trainer: Trainer) -> None:
        if not self.show:
            return
        self._bar = RichProgress(
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
            epoch = min(trainer.progress.epoch + 1, trainer.epochs)
            self._bar.update(self._task, description=f"{self.title}epoch {epoch}/{trainer.epochs}")

    def logged(self, trainer: Trainer, values: dict[str, float]) -> None:
        if self._bar:
            self._bar.update(self._task, completed=trainer.progress.update, values=line(values))

    def run_end(self, trainer: Trainer) -> None:
        if self._bar:
            self._bar.update(self._task, completed=trainer.progress.update)
            self._bar.stop()
            self._bar = None
