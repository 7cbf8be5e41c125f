"""Runs that are killed at random moments, in the middle of a write and in the middle of an upload."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.command import environment, only_run, record_of, records, run_command
from tests.support.forked import FRESH_RANKS, as_main, started
from tests.support.same_run import differences, doubled, points, rows, state

SETTINGS = [
    *("model=mlp", "model.dropout=0.3", "optimizer=adamw", "callbacks=ema", "device=cpu"),
    *("scheduler=warmup_cosine", "scheduler.warmup_updates=7", "accum.steps=3", "trainer.epochs=4"),
    *("trainer.log_every=4", "callbacks.checkpoint.every_updates=5", "tracking.flush_seconds=0.2"),
]
RANKS = ["accum=ddp", "accum.processes=2"]
# Calls in the middle of which a process is killed: writes of files, and uploads.
WRITES = ("os.replace", "torch.save", "builtins.open")
UPLOADS = tuple(
    f"mlflow.MlflowClient.{name}"
    for name in ("log_batch", "log_artifact", "create_logged_model", "log_outputs", "set_terminated")
)


@dataclass(frozen=True)
class Kill:
    """How a run is stopped.

    Attributes:
        signals: sent one after the other.
        seconds: from the start of the process to the first signal; None for a kill in a call.
        call: the function in whose call number `nth` the process kills itself, or None.
        rank: whether one of the ranks is killed, instead of the process that started them.
    """

    signals: tuple[signal.Signals, ...]
    seconds: float | None = None
    call: str | None = None
    nth: int = 0
    ranks: bool = False
    rank: bool = False

    @property
    def kind(self) -> str:
        names = "+".join(one.name for one in self.signals)
        where = "at a write" if self.call in WRITES else "at an upload" if self.call else "at random"
        return f"{names} {where}{', two ranks' if self.ranks else ''}"


@dataclass(frozen=True)
class Outcome:
    """What became of a run that was stopped.

    Attributes:
        reached: whether it came before the run had ended.
        resumed: whether it had a checkpoint to go on from.
        different: where state, journal or points are not those of a run that was never stopped.
        doubled: keys with two points of one step, and logged models of one name.
        partial: temporary files that are left.
        running: whether it is RUNNING after the next command.
    """

    kill: Kill
    reached: bool
    resumed: bool
    different: list[str]
    doubled: list[str]
    partial: list[str]
    running: bool

    @property
    def good(self) -> bool:
        return not (self.different or self.doubled or self.partial or self.running)


def random_kills(count: int, seed: int, longest: float, ranks: bool = False) -> Iterator[Kill]:
    """Kills of all kinds in turn; `longest` is the time in seconds that a run takes."""
    draw = random.Random(seed)
    single = [(signal.SIGKILL,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)]
    for number in range(count):
        kind = number % 5
        if kind < 3 or ranks:  # ranks are processes of their own, in which no call is replaced
            kind = number % 3
            # The ranks' processes start for more than half of the time.
            seconds = draw.uniform(0.5 * longest if ranks else 0.1, longest)
            yield Kill(single[kind], seconds, ranks=ranks, rank=ranks and draw.random() < 0.5)
        else:
            calls = WRITES if kind == 3 else UPLOADS
            most = 12 if kind == 3 else 4
            yield Kill((signal.SIGKILL,), None, draw.choice(calls), draw.randrange(most))


def reference(folder: Path, ranks: bool) -> tuple[Path, float]:
    """A run that is never stopped, and the seconds that it took."""
    run_command("run", "--help", folder=folder / "first")  # the process that all are forked from starts now
    begin = time.monotonic()
    env = environment(**FRESH_RANKS) if ranks else None
    done = run_command("run", *SETTINGS, *(RANKS if ranks else []), folder=folder, env=env)
    assert done.code == 0, done
    return only_run(folder), time.monotonic() - begin


def tried(folder: Path, kill: Kill, never_stopped: Path) -> Outcome:
    """Starts a run in `folder`, stops it, resumes it and compares it with the one that was never stopped."""
    folder.mkdir(parents=True)
    reached = _stopped(folder, kill)
    runs = sorted(folder.glob("outputs/*/*"))
    resumed = bool(runs) and any((runs[0] / "checkpoints").glob("*.pt"))
    different: list[str] = []
    finished = resumed and json.loads((runs[0] / "summary.json").read_text())["status"] == "FINISHED"
    if not reached or finished:  # its launcher may be killed just after the ranks have ended
        different += _differences(runs[0], never_stopped)
    elif resumed:
        done = run_command("run", f"resume={runs[0]}", folder=folder)
        if done.code != 0:
            different.append(f"resume ends with {done.code}: {done.stderr[-500:]}")
        else:
            different += _differences(runs[0], never_stopped)
    elif (folder / "mlflow.db").exists():
        quick = ("model=mlp", "device=cpu", "trainer.max_updates=1")
        done = run_command("run", *quick, folder=folder)
        if done.code != 0:
            different.append(f"the next run ends with {done.code}: {done.stderr[-500:]}")
    recorded = records(folder) if (folder / "mlflow.db").exists() else []
    return Outcome(
        kill,
        reached,
        resumed,
        different,
        [key for record in recorded for key in doubled(record)],
        [str(path) for path in folder.glob("outputs/**/*.partial")],
        any(record.status == "RUNNING" for record in recorded),
    )


def _differences(run: Path, never_stopped: Path) -> list[str]:
    places = [f"state{at}" for at in differences(state(run), state(never_stopped))]
    if rows(run) != rows(never_stopped):
        places.append("journal")
    one, other = points(record_of(run)), points(record_of(never_stopped))
    places += [f"points of {key}" for key in {*one, *other} if one.get(key) != other.get(key)]
    summary = json.loads((run / "summary.json").read_text())
    if summary["status"] != "FINISHED":
        places.append(f"summary: {summary['status']}")
    return places


def _stopped(folder: Path, kill: Kill) -> bool:
    """Runs in `folder` until the kill has worked. Returns whether it came before the run's end."""
    arguments = [*SETTINGS, *(RANKS if kill.ranks else [])]
    with tempfile.TemporaryDirectory() as streams:
        outputs = [Path(streams) / name for name in ("stdout", "stderr")]
        process = started(
            # The launcher ends the ranks that it finds among its children, which forked ones are not.
            _run,
            arguments,
            kill.call,
            kill.nth,
            folder=folder,
            env=environment(**FRESH_RANKS) if kill.ranks else environment(),
            outputs=outputs,
        )
        if kill.seconds is not None:
            process.join(kill.seconds)
            for number, one in enumerate(kill.signals):
                if number:
                    process.join(random.Random(folder.name).uniform(0, 0.3))
                if process.is_alive():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(_victim(process.pid, kill), one)
        process.join(120)
        reached = process.exitcode != 0
        if process.is_alive():
            process.kill()
            process.join()
            raise TimeoutError(f"{kill}: {outputs[0].read_text()} {outputs[1].read_text()}")
    _await_children(folder)
    return reached


def _victim(pid: int, kill: Kill) -> int:
    children: list[psutil.Process] = []
    if kill.rank:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended just now
            children = psutil.Process(pid).children()
    return random.Random(str(kill)).choice([child.pid for child in children]) if children else pid


def _await_children(folder: Path) -> None:
    """Waits for ranks that outlive a killed launcher for a moment."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if not any(_works_in(process, folder) for process in psutil.process_iter()):
            return
        time.sleep(0.05)


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _run(arguments: Sequence[str], call: str | None, nth: int) -> None:
    """`python -m accumexp.run`, which kills itself in the call number `nth` of a function."""
    if call is not None:
        _kill_in(call, nth)
    as_main("accumexp.run", list(arguments))


def _kill_in(call: str, nth: int) -> None:
    path, _, name = call.rpartition(".")
    module, _, owner = path.partition(".MlflowClient")
    holder: Any = importlib.import_module(module)
    if path.endswith("MlflowClient"):
        holder = holder.MlflowClient
    original, made = getattr(holder, name), []

    def wrapped(*arguments: Any, **named: Any) -> Any:
        positional: list[Any] = list(arguments)
        concerned = name != "open" or (len(positional) > 1 and "w" in str(positional[1]))
        if concerned:
            made.append(1)
            if len(made) > nth:
                if name == "save" and isinstance(positional[1], str | Path):
                    Path(positional[1]).write_bytes(b"half of a checkpoint")
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*positional, **named)

    setattr(holder, name, wrapped)
    sys.stdout.flush()
