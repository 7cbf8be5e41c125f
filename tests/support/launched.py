"""What tests of whole runs over several ranks share: trouble on a rank, its weights, and who is alive."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from accumexp.training.checkpoint import find, load
from accumexp.training.shards import folder_of, load_model

from .command import environment

TROUBLE = '''
import os
import pathlib
import signal
from accumexp.callbacks import Callback

class Trouble(Callback):
    """After update `at` on `rank` (None: on all), once: a signal or an error."""

    def __init__(self, at, what, mark, rank=None):
        self.at, self.what, self.rank = at, what, rank
        self.mark = pathlib.Path(f"{mark}-{os.environ.get('RANK')}")

    def update_end(self, trainer):
        here = self.rank is None or os.environ.get("RANK") == str(self.rank)
        if here and trainer.progress.update == self.at and not self.mark.exists():
            self.mark.touch()
            if self.what == "ERROR":
                raise ZeroDivisionError("one rank's own bug")
            os.kill(os.getpid(), getattr(signal, self.what))
'''
SMALL = ["model=mlp", "device=cpu", "tracking.system_metrics=false", "trainer.log_every=4"]
EXACT = [*SMALL, "precision=fp64", "accum.steps=3", "trainer.epochs=2", "data.batch_size=101"]
STATEFUL = [*SMALL, "model.dropout=0.3", "optimizer=adamw", "scheduler=cosine", "accum.steps=2"]


def troubled(folder: Path) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trouble.py").write_text(TROUBLE)
    return environment(folder)


def trouble(folder: Path, what: str, at: int, rank: int | None = None) -> str:
    where = "" if rank is None else f", rank: {rank}"
    made = f"_target_: trouble.Trouble, what: {what}, at: {at}, mark: '{folder / 'mark'}'{where}"
    return f"+callbacks.trouble={{{made}}}"


def saved_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights in a run's newest checkpoint, whole."""
    path = find(run)
    content = load(path)
    parts = folder_of(path, content)
    if parts is None:
        return content["model"]
    from accumexp.config.overrides import changed
    from accumexp.training.experiment import Experiment

    config = changed(content["config"], ["accum.strategy=standalone", "accum.processes=1"])
    model = Experiment.build(config).model
    load_model(model, parts)
    return model.state_dict()


def ranks_alive() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        mine = (process.info["environ"] or {}).get("ACCUMEXP_TEST") == str(os.getpid())
        if mine and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def until(condition: Any, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
