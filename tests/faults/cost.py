"""What an update costs more while the tracking server is away than with `tracking=none`."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from accumexp.tracking.record import RunRecord
from accumexp.tracking.tracker import Tracker
from accumexp.training.callbacks import Callback
from accumexp.training.trainer import Trainer
from tests.support.command import environment

from .outages import when_training
from .proxy import Proxy, tracking_server

BLOCK = 20  # updates
PART = 400  # updates whose median is taken
FIRST = 200  # the first update that is timed
FILE = "seconds.json"


class AlternatingTracker(Callback):
    """Times updates, and takes the run's tracker away in every other block of them, as `tracking=none` does.

    Two runs beside each other differ by several per cent through their processes alone.
    """

    order = 1000

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.trackers: list[Tracker] = []
        self.begin = 0.0

    def update_end(self, trainer: Trainer) -> None:
        now = time.perf_counter()
        record = trainer.log.sink
        assert isinstance(record, RunRecord)
        if trainer.progress.update == FIRST:
            self.trackers = [record.tracker, Tracker()]
        elif trainer.progress.update > FIRST:
            self.seconds.append(now - self.begin)
            record.tracker = self.trackers[len(self.seconds) // BLOCK % 2]
        self.begin = time.perf_counter()

    def run_end(self, trainer: Trainer) -> None:
        record = trainer.log.sink
        assert isinstance(record, RunRecord)
        record.tracker = self.trackers[0]
        Path(FILE).write_text(json.dumps(self.seconds))


@dataclass(frozen=True)
class Cost:
    """Time of an update that is published to a server that fails, to that of an update without a tracker.

    Attributes:
        ratio: geometric mean over the parts of the run, of the ratio of their medians.
        error: its standard error.
        milliseconds: the median update without a tracker.
    """

    mode: str
    ratio: float
    error: float
    milliseconds: float

    def row(self) -> list[str]:
        return [self.mode, f"{self.ratio:.4f} ± {self.error:.4f}", f"{self.milliseconds:.2f} ms"]


COST_TITLES = ["server", "published update, to one with tracking=none", "update"]


def cost(folder: Path, mode: str, updates: int) -> Cost:
    """Trains LeNet-5 in 4 micro-batches and publishes every update; the server fails from update 100 on."""
    folder.mkdir(parents=True)
    with tracking_server(folder / "server") as port:
        proxy = Proxy(port)
        try:
            command = [
                *(sys.executable, "-m", "accumexp.run", "device=cpu", "accum.steps=4", "trainer.log_every=1"),
                *(f"trainer.max_updates={updates + FIRST}", "trainer.epochs=100000"),
                *("trainer.eval_every=100000", f"tracking.uri={proxy.uri}"),
                "+callbacks.cost._target_=tests.faults.cost.AlternatingTracker",
            ]
            run = subprocess.Popen(
                command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            when_training(folder, FIRST // 2)
            proxy.mode = mode
            run.wait()
        finally:
            proxy.close()
    seconds = json.loads((folder / FILE).read_text())
    logs = [math.log(_ratio(seconds[at : at + PART])) for at in range(0, len(seconds) - PART + 1, PART)]
    return Cost(
        mode,
        math.exp(statistics.fmean(logs)),
        statistics.stdev(logs) / math.sqrt(len(logs)),
        1000 * statistics.median(_of_block(seconds, 1)),
    )


def _ratio(seconds: list[float]) -> float:
    return statistics.median(_of_block(seconds, 0)) / statistics.median(_of_block(seconds, 1))


def _of_block(seconds: list[float], which: int) -> list[float]:
    """The times of the even (0) or odd (1) blocks."""
    return [value for index, value in enumerate(seconds) if index // BLOCK % 2 == which]
