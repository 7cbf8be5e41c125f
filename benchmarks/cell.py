"""A cell of a benchmark: training loops on one task, their gradients compared, then timed in turns."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from accumexp.environment.memory import MIB
from accumexp.errors import UsageError
from accumexp.training.metrics_log import FIRST_UPDATES

from .loops import (
    HandWritten,
    Loop,
    SingleBatch,
    WrongGradient,
    built,
    first_gradient,
    relative_error,
    saved_bytes,
    timed,
)
from .measure import Rows, in_turns, not_installed, ratio_of
from .tasks import Task, distinct_samples

Label = tuple[int, str]  # (number of the cell, name of the loop)
TURN_SECONDS, FEWEST_ROUNDS, MOST_ROUNDS = 0.1, 5, 201
FREE_SHARE = 0.5
WARM_UP_SECONDS = 0.5


@dataclass(frozen=True)
class Plan:
    """How a cell is timed: `rounds` of `epochs` turns of `updates` updates each, of every loop."""

    rounds: int
    epochs: int
    updates: int


@dataclass
class Timings:
    """By loop: seconds and logged updates of each round, and seconds of the flushes between rounds."""

    seconds: dict[Label, list[float]] = field(default_factory=dict)
    logged: dict[Label, list[int]] = field(default_factory=dict)
    flushes: dict[Label, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OneMicroBatch:
    """Seconds and bytes saved for backward of one micro-batch in the hand-written loop."""

    seconds: float
    saved: int


def one_micro_batch(task: Task) -> OneMicroBatch:
    loop = built(HandWritten, replace(task, steps=1, samples=task.micro_batch))
    saved = saved_bytes(loop)
    return OneMicroBatch(min(timed(loop) for _ in range(2)), saved)


def planned(
    task: Task, update: float, seconds: float, rounds: int | None = None, updates: int | None = None
) -> Plan:
    """How to spend `seconds` on each loop of a cell whose update takes `update` seconds.

    A round is one turn of about 0.1 s and at least one update. Short rounds expose a loop and the reference
    to the same changes of the machine's speed; many rounds make their median precise.

    Args:
        rounds: the number of rounds, instead of as many as fit.
        updates: in a round, rounded up to whole epochs of the model's samples.
    """
    epoch = max(1, distinct_samples(task.model) // task.batch)
    if updates is not None:
        epochs = -(-updates // epoch)
        return Plan(rounds or 3 * FEWEST_ROUNDS, epochs, epoch)
    most = max(1.0, min(epoch, TURN_SECONDS / update))
    turn = max(size for size in (1, 2, 5, 10, 25, 50, 100) if size <= most)
    rounds = rounds or min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(seconds / (turn * update))))
    return Plan(rounds, 1, turn)


def timings(
    loops: Mapping[Label, Loop], rounds: int, epochs: int, warm_up: float = WARM_UP_SECONDS
) -> Timings:
    """Times of all loops, which take turns epoch by epoch; a round is `epochs` turns of each.

    A loop flushes after so many seconds of its own training, and once at the end.
    """
    times = Timings()
    since: dict[Label, float] = {}
    for label, loop in loops.items():
        times.seconds[label], times.logged[label] = [0.0] * rounds, [0] * rounds
        times.flushes[label] = since[label] = 0.0
        warm(loop, warm_up)

    def take(label: Label, turn: int) -> None:
        loop, number = loops[label], turn // epochs
        logged = loop.logged
        spent = timed(loop)
        times.seconds[label][number] += spent
        times.logged[label][number] += loop.logged - logged
        since[label] += spent
        if flush := loop.flush(since[label]):
            times.flushes[label] += flush
            since[label] = 0.0

    def every() -> Iterable[int]:
        for turn in range(rounds * epochs):
            if turn % epochs == 0:
                gc.collect()
            yield turn

    in_turns(list(loops), every(), take)
    for label, loop in loops.items():
        times.flushes[label] += loop.flush(float("inf"))
    return times


def warm(loop: Loop, seconds: float) -> None:
    """Trains for the first hundred updates, which a run logs one by one, or for `seconds`."""
    spent, updates = 0.0, 0
    while not updates or (updates < FIRST_UPDATES and spent < seconds):
        spent += timed(loop)
        updates += loop.task.updates
    loop.flush(float("inf"))


def summary(label: Label, times: Timings, updates: int, reference: str) -> dict[str, Any]:
    """A loop's figures; the time of its flushes is added to its rounds in proportion to their length."""
    seconds = times.seconds[label]
    factor = 1 + times.flushes[label] / sum(seconds)
    spread = [factor * value for value in seconds]
    row: dict[str, Any] = {
        "median_ms": 1e3 * statistics.median(spread) / updates,
        "min_ms": 1e3 * min(spread) / updates,
    }
    row |= ratio_of(spread, times.seconds[label[0], reference], times.logged[label])
    return row | {"flush_share": factor - 1}


def checked(
    kinds: Iterable[type[Loop]], task: Task, saved: int = 0
) -> tuple[dict[str, float], dict[str, str], dict[str, str]]:
    """The error of each loop's first gradient, why others are left out, and why others are refused; by name.

    The first of `kinds` is the reference. `saved` is the bytes that a micro-batch saves for backward.
    """
    reference: list[Tensor] = []
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    refused: dict[str, str] = {}
    for kind in kinds:
        # The gradient is computed in float64, of twice the bytes.
        if kind is SingleBatch and (reason := _too_large(task, 2 * task.steps * saved)):
            left_out[kind.name] = reason
            continue
        try:
            gradient = first_gradient(kind, task)
            reference = reference or gradient
            errors[kind.name] = relative_error(kind.name, gradient, reference)
        except ModuleNotFoundError as error:
            left_out[kind.name] = not_installed(error)
        except UsageError as error:
            left_out[kind.name] = str(error)
        except WrongGradient as error:
            refused[kind.name] = str(error)
    gc.collect()
    return errors, left_out, refused


def _too_large(task: Task, needed: int) -> str | None:
    if task.device.type == "cuda":
        free = torch.cuda.mem_get_info(task.device)[0]
    else:
        free = psutil.virtual_memory().available
    if needed <= FREE_SHARE * free:
        return None
    return f"needs {needed / MIB:,.0f} MiB of activations, {free / MIB:,.0f} MiB are free"


def measured(
    kinds: Sequence[type[Loop]],
    task: Task,
    seconds: float,
    one: OneMicroBatch,
    rounds: int | None = None,
    updates: int | None = None,
) -> dict[str, Any]:
    """The figures of all loops on `task`; the first one is the reference."""
    return measured_together(kinds, [(task, one)], seconds, rounds, updates)[0]


def measured_together(
    kinds: Sequence[type[Loop]],
    tasks: Sequence[tuple[Task, OneMicroBatch]],
    seconds: float,
    rounds: int | None = None,
    updates: int | None = None,
) -> Rows:
    """The figures of all loops on every task, one cell a task.

    All loops on all tasks take turns, so that times of different tasks can be compared: `times` is the
    median over rounds of an update's time divided by that of the first task.
    """
    checks = [checked(kinds, task, one.saved) for task, one in tasks]
    plans = [planned(task, task.steps * one.seconds, seconds, rounds, updates) for task, one in tasks]
    loops: dict[Label, Loop] = {}
    for number, ((task, _), plan, (errors, _, _)) in enumerate(zip(tasks, plans, checks, strict=True)):
        whole = replace(task, samples=plan.updates * task.batch)
        loops |= {(number, kind.name): built(kind, whole) for kind in kinds if kind.name in errors}
    most = min(plan.rounds for plan in plans)
    times = timings(loops, most, max(plan.epochs for plan in plans), min(WARM_UP_SECONDS, seconds))
    cells: Rows = []
    for number, ((task, _), plan, (errors, left_out, refused)) in enumerate(
        zip(tasks, plans, checks, strict=True)
    ):
        count = plan.epochs * plan.updates
        rows: dict[str, dict[str, Any]] = {}
        for name in errors:
            label, loop = (number, name), loops.pop((number, name))
            rows[name] = summary(label, times, count, kinds[0].name)
            if first := times.seconds.get((0, name)):
                shorter = plans[0].epochs * plans[0].updates / count
                rows[name]["times"] = shorter * ratio_of(times.seconds[label], first)["ratio"]
            rows[name] |= {"saved_mib": saved_bytes(loop) / MIB, "gradient_error": errors[name]}
            rows[name] |= {"seconds": times.seconds[label]}
            loop.close()
        cells.append({"model": task.model, "micro_batch": task.micro_batch, "steps": task.steps})
        cells[-1] |= {"updates": count, "rounds": most, "turns": plan.epochs}
        cells[-1] |= {"loops": rows, "skipped": left_out, "refused": refused}
    gc.collect()
    return cells
