"""A tracking server that fails while a run trains: what it costs, what it loses, how long the end takes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.command import environment, journal, only_run, run_command

from .proxy import Proxy, tracking_server

SETTINGS = ("device=cpu", "accum.steps=4", "trainer.log_every=1", "tracking.flush_seconds=1")
LONG = 10**9  # seconds


@dataclass(frozen=True)
class Outage:
    """One run, and what became of it.

    Attributes:
        lines: the lines about the server that it printed.
        late: points that the server had only after the sync.
        lost: points of the journal that the server does not have after the sync.
        doubled: points that it has twice.
        stop_seconds: from SIGTERM to the end of the process, None for a run that ended by itself.
        code: its exit code.
    """

    mode: str
    seconds: float
    lines: int
    late: int
    lost: int
    doubled: int
    stop_seconds: float | None
    code: int

    def row(self) -> list[str]:
        stop = "" if self.stop_seconds is None else f"{self.stop_seconds:.1f} s"
        length = "for good" if self.seconds >= LONG else f"{self.seconds:.0f} s"
        return [
            f"{self.mode}, {length}",
            *map(str, (self.lines, self.late, self.lost, self.doubled)),
            stop,
        ]


TITLES = [
    "server",
    "lines",
    "sent later",
    "lost",
    "doubled",
    "SIGTERM to end",
]


def outages(
    folder: Path,
    modes: Sequence[str],
    lengths: Sequence[float],
    updates: int,
    stop_after: float | None = None,
) -> list[Outage]:
    """One run for each mode and length of outage, which begins in the middle of training.

    Args:
        lengths: seconds until the server answers again; `LONG` for one that does not before the sync.
        stop_after: seconds after the outage's begin at which the run gets SIGTERM.
    """
    with tracking_server(folder / "server") as port:
        proxy = Proxy(port)
        try:
            cases = [(mode, length) for length in lengths for mode in modes]
            limits = [f"trainer.max_updates={updates}", "trainer.epochs=100000"]
            return [
                _outage(folder / f"{mode}-{length:.0f}", proxy, mode, length, limits, stop_after)
                for mode, length in cases
            ]
        finally:
            proxy.close()


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "accumexp.run", *SETTINGS, *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _outage(
    folder: Path, proxy: Proxy, mode: str, length: float, settings: Sequence[str], stop_after: float | None
) -> Outage:
    proxy.mode = "pass"
    process = _start(folder, *settings, f"tracking.uri={proxy.uri}")
    begin = when_training(folder, 100)
    proxy.mode = mode
    stopped: float | None = None
    while process.poll() is None:
        now = time.time()
        if now - begin > length:
            proxy.mode = "pass"
        if stop_after is not None and stopped is None and now - begin > stop_after:
            process.send_signal(signal.SIGTERM)
            stopped = now
        time.sleep(0.02)
    end = time.time()
    output = process.communicate()[0]
    run = only_run(folder)
    proxy.mode = "pass"
    before = _points(run, proxy)
    if (run / "unsent.jsonl").exists():
        done = run_command("report", f"sync={run}", folder=folder)
        assert done.code == 0, done
    after = _points(run, proxy)
    logged = {(key, row["update"]) for row in journal(run) for key in row if key.startswith("train/loss")}
    stored = [(key, step) for key, step in after if key.startswith("train/loss")]
    late = len(logged & set(after)) - len(logged & set(before))
    return Outage(
        mode,
        length,
        sum("tracking:" in line for line in output.splitlines()),
        late,
        len(logged - set(stored)),
        len(stored) - len(set(stored)),
        None if stopped is None else end - stopped,
        process.returncode,
    )


def when_training(folder: Path, update: int) -> float:
    """Waits for an update; returns the time."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for path in folder.glob("outputs/*/*/metrics.jsonl"):
            if path.read_text().count("\n") >= update:
                return time.time()
        time.sleep(0.05)
    raise TimeoutError(f"{folder}: no update {update}")


def _points(run: Path, proxy: Proxy) -> list[tuple[str, int]]:
    from mlflow import MlflowClient

    client = MlflowClient(proxy.uri)
    run_id = json.loads((run / "summary.json").read_text())["run_id"]
    keys = client.get_run(run_id).data.metrics
    return [(key, point.step) for key in keys for point in client.get_metric_history(run_id, key)]
