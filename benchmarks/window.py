"""Times one update of LeNet-5 under accumexp, written by hand and under its peers, interleaved.

python -m benchmarks.window --rounds 15 --json window.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import platform
import random
import statistics
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from accumexp.accum import measure_activations
from accumexp.data import Digits
from accumexp.seeding import seed_everything
from accumexp.system import MIB, device_name, pick_device

from .contenders import CONTENDERS, SEED, Accumexp, Contender, HandWritten, Task

TOLERANCE = 1e-5
console = Console()
if not console.is_terminal:
    console = Console(width=110)  # a pipe or a file has no width of its own


@contextlib.contextmanager
def peers_quiet(name: str) -> Iterator[None]:
    """Drops warnings and advice while one of the peers is at work."""
    if name == Accumexp.name:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def built(kind: type[Contender], task: Task) -> Contender:
    """A contender with the same initial weights and the same kernels as every other."""
    seed_everything(SEED, task.deterministic)
    with peers_quiet(kind.name):
        made = kind(task)
    for logger in ("lightning.pytorch", "lightning.fabric", "accelerate"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    return made


def timed(contender: Contender) -> float:
    """Seconds of one epoch, with the global switches that a peer may have turned put back before it."""
    task = contender.task
    seed_everything(SEED, task.deterministic)
    with peers_quiet(contender.name):
        return contender.seconds()


def first_gradient(contender: Contender) -> list[Tensor]:
    """The gradient of the first update: what momentum starts from, whenever `.grad` is zeroed."""
    state = contender.optimizer.state
    return [state[p]["momentum_buffer"].cpu().clone() for p in contender.model.parameters()]


def saved_bytes(contender: Contender) -> int:
    """Peak bytes saved for backward in one update, without parameters and images."""
    fed: list[Any] = []  # alive to the end, or an activation could get a batch's address
    with measure_activations(contender.model, []) as saved:

        def exclude(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            fed.append(inputs)
            saved.exclude(inputs)

        handle = contender.model.register_forward_pre_hook(exclude)
        timed(contender)
        handle.remove()
    return saved.peak_bytes


def first_update(kind: type[Contender], task: Task) -> tuple[list[Tensor], int]:
    """The gradient of the first update, and the bytes that the second saves for backward."""
    contender = built(kind, task)
    timed(contender)
    gradient = first_gradient(contender)
    peak = saved_bytes(contender)
    contender.close()
    return gradient, peak


def relative_error(name: str, gradient: list[Tensor], reference: list[Tensor]) -> float:
    """The largest of the parameters' errors, each relative to its gradient's norm.

    Raises:
        AssertionError: if it is above the tolerance.
    """
    pairs = zip(gradient, reference, strict=True)
    error = max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)
    assert error <= TOLERANCE, f"{name}: the gradient is off by {error:.1e} of its norm"
    return error


def measured(contenders: list[Contender], epochs: int, rounds: int) -> dict[str, list[float]]:
    """Seconds by contender, one number a round of `epochs` epochs.

    Contenders take turns epoch by epoch, in a new random order each time, so that a machine whose speed
    drifts is alike to all in every round.
    """
    seconds: dict[str, list[float]] = {contender.name: [0.0] * rounds for contender in contenders}
    for contender in contenders:
        timed(contender)
    orders = random.Random(SEED)
    for turn in track(range(rounds * epochs), "training", console=console, transient=True):
        if turn % epochs == 0:
            gc.collect()
        for contender in orders.sample(contenders, len(contenders)):
            seconds[contender.name][turn // epochs] += timed(contender)
        if (turn + 1) % epochs == 0:
            for contender in contenders:
                start = perf_counter()
                contender.flush()
                seconds[contender.name][turn // epochs] += perf_counter() - start
    return seconds


def summary(seconds: list[float], reference: list[float], updates: int) -> dict[str, float]:
    ratios = [own / other for own, other in zip(seconds, reference, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "median_ms": 1e3 * statistics.median(seconds) / updates,
        "min_ms": 1e3 * min(seconds) / updates,
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }


def environment(device: torch.device) -> dict[str, Any]:
    found = {"torch": torch.__version__, "device": device_name(device), "threads": torch.get_num_threads()}
    found |= {"python": platform.python_version(), "cores": os.cpu_count()}
    for package in ("accelerate", "lightning", "mlflow"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def show(report: dict[str, Any]) -> None:
    table = Table("contender", title="one update", title_justify="left")
    for heading in ("median ms", "min ms", "ratio", "its quartiles", "saved MiB", "gradient off by"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in report["contenders"].items():
        quartiles = f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        values = [f"{row['median_ms']:.3f}", f"{row['min_ms']:.3f}", f"{row['ratio']:.3f}", quartiles]
        table.add_row(name, *values, f"{row['saved_mib']:.3f}", f"{row['gradient_error']:.1e}")
    console.print(table)
    for part in ("settings", "environment"):
        line = ", ".join(f"{key} {value}" for key, value in report[part].items())
        console.print(f"{part}: {line}", highlight=False, soft_wrap=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.window", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, default=220, help="a round, rounded up to whole epochs")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="torch's own choice if left out")
    parser.add_argument("--deterministic", action="store_true", help="reproducible kernels for everyone")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="comma-separated names; %(default)s")
    asked = parser.parse_args()
    asked.only = [HandWritten.name, *(name for name in asked.only.split(",") if name != HandWritten.name)]
    if unknown := [name for name in asked.only if name not in CONTENDERS]:
        parser.error(f"--only: no contender {', '.join(unknown)}; {', '.join(CONTENDERS)}")
    if min(asked.rounds, asked.updates, asked.micro_batch, asked.steps, asked.threads or 1) < 1:
        parser.error("numbers are at least 1")
    return asked


def main() -> None:
    asked = arguments()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    # TF32 would make the gradients of two kernels differ more than the two definitions might.
    torch.backends.cudnn.allow_tf32 = False
    device, batch = pick_device(asked.device), asked.micro_batch * asked.steps
    task = Task(device, asked.micro_batch, asked.steps, asked.deterministic, batch)
    per_epoch = len(Digits(train=True)) // batch
    if not per_epoch:
        raise SystemExit(f"error: {batch} samples an update are more than there are")
    epochs = -(-asked.updates // per_epoch)
    whole = replace(task, samples=per_epoch * batch)
    reference: list[Tensor] = []
    checks: dict[str, tuple[float, int]] = {}
    contenders: list[Contender] = []
    skipped: dict[str, str] = {}
    for kind in map(CONTENDERS.__getitem__, asked.only):
        try:
            gradient, peak = first_update(kind, task)
            reference = reference or gradient  # the hand-written loop comes first
            checks[kind.name] = relative_error(kind.name, gradient, reference), peak
            contenders.append(built(kind, whole))
        except ModuleNotFoundError as error:
            skipped[kind.name] = f"{error.name} is not installed: pip install 'accumexp[bench]'"
            console.print(f"{kind.name} skipped: {skipped[kind.name]}", highlight=False, markup=False)
    seconds = measured(contenders, epochs, asked.rounds)
    updates = epochs * per_epoch
    rows: dict[str, dict[str, float]] = {}
    for contender in contenders:
        name = contender.name
        error, peak = checks[name]
        rows[name] = summary(seconds[name], seconds[HandWritten.name], updates)
        rows[name] |= {"saved_mib": peak / MIB, "gradient_error": error}
        contender.close()
    settings = {"micro_batch": asked.micro_batch, "steps": asked.steps, "updates": updates}
    settings |= {"rounds": asked.rounds, "deterministic": asked.deterministic}
    report = {"environment": environment(device), "settings": settings, "contenders": rows}
    show(report)
    if asked.json:
        report |= {"skipped": skipped, "seconds": seconds}
        asked.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
