"""A callback that stops a run, kills it or fails in it, and the override that adds one to a command."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from accumexp.training.callbacks import Callback
from accumexp.training.trainer import Trainer


class Trouble(Callback):
    """After update `at`, a signal to its own process or a ZeroDivisionError.

    Args:
        what: the signal's name, or `ERROR`.
        rank: the rank that it happens on; None for all.
        steps: the steps of the only windows that it happens in; None for all.
        mark: where given, it happens once on each rank in the life of a file of this name.
    """

    def __init__(
        self, at: int, what: str, rank: int | None = None, steps: int | None = None, mark: str | None = None
    ) -> None:
        self.at, self.what, self.steps = at, what, steps
        process_rank = int(os.environ.get("RANK", "0"))
        self.here = rank in (None, process_rank)
        self.mark = Path(f"{mark}-{process_rank}") if mark else None

    def update_end(self, trainer: Trainer) -> None:
        concerned = self.here and self.steps in (None, trainer.window.steps)
        if not concerned or trainer.progress.update != self.at or (self.mark and self.mark.exists()):
            return
        if self.mark:
            self.mark.touch()
        if self.what == "ERROR":
            raise ZeroDivisionError("one rank's own bug")
        os.kill(os.getpid(), getattr(signal, self.what))


def trouble(what: str, at: int, mark: Path | None = None, **options: int) -> str:
    """The override for a `Trouble`; `options` are its `rank` and `steps`."""
    given = [f", {key}: {value}" for key, value in options.items()]
    if mark:
        given.append(f", mark: '{mark}'")
    return f"+callbacks.trouble={{_target_: {__name__}.Trouble, what: {what}, at: {at}{''.join(given)}}}"
