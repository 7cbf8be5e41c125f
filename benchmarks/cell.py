"""Cells of a benchmark: contenders on one task, checked against each other, then timed in turns."""

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
from accumexp.training.trainer import FIRST_UPDATES

from .contenders import (
    Contender,
    HandWritten,
    SingleBatch,
    WrongGradient,
    built,
    first_gradient,
    relative_error,
    saved_bytes,
    timed,
)
from .measure import Rows, in_turns, not_installed, ratio_of
from .tasks import Task, own_samples

Label = tuple[int, str]  # of a contender in a cell: the cell's number, the contender's name
TURN_SECONDS, FEWEST_ROUNDS, MOST_ROUNDS = 0.1, 5, 201
FREE_SHARE = 0.5
WARM_UP_SECONDS = 0.5


@dataclass(frozen=True)
class Plan:
    """How a cell is timed: `rounds` of `epochs` turns of `updates` updates each, for every contender."""

    rounds: int
    epochs: int
    updates: int


@dataclass
class Timings:
    """By contender: seconds of each round, its updates that were logged, seconds of what is in no round."""

    seconds: dict[Label, list[float]] = field(default_factory=dict)
    logged: dict[Label, list[int]] = field(default_factory=dict)
    flushes: dict[Label, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OneMicroBatch:
    """An update of one micro-batch in the hand-written loop: its seconds, and bytes saved for backward."""

    seconds: float
    saved: int


def one_micro_batch(task: Task) -> OneMicroBatch:
    contender = built(HandWritten, replace(task, steps=1, samples=task.micro_batch))
    saved = saved_bytes(contender)
    return OneMicroBatch(min(timed(contender) for _ in range(2)), saved)


def planned(
    task: Task, update: float, seconds: float, rounds: int | None = None, updates: int | None = None
) -> Plan:
    """How to spend `seconds` on each contender of a cell whose update takes `update` seconds.

    A round is a turn of about a tenth of a second, and of one update at least: short, so that a contender and
    the reference meet the same moods of the machine, and many, so that their median is worth something.
    `updates` are those of a round, up to whole turns.
    """
    own = max(1, own_samples(task.model) // task.batch)
    if updates is not None:
        epochs = -(-updates // own)
        return Plan(rounds or 3 * FEWEST_ROUNDS, epochs, own)
    most = max(1.0, min(own, TURN_SECONDS / update))
    turn = max(size for size in (1, 2, 5, 10, 25, 50, 100) if size <= most)
    found = rounds or min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(seconds / (turn * update))))
    return Plan(found, 1, turn)


def timings(
    contenders: Mapping[Label, Contender], rounds: int, epochs: int, warm_up: float = WARM_UP_SECONDS
) -> Timings:
    """Times of all contenders, who take turns epoch by epoch, so many in a round.

    What a contender does every few seconds, not in every round, is done when its own time has come, and
    once at the end.
    """
    found = Timings()
    since: dict[Label, float] = {}
    for label, contender in contenders.items():
        found.seconds[label], found.logged[label] = [0.0] * rounds, [0] * rounds
        found.flushes[label] = since[label] = 0.0
        warm(contender, warm_up)

    def take(label: Label, turn: int) -> None:
        contender, number = contenders[label], turn // epochs
        logged = contender.logged
        spent = timed(contender)
        found.seconds[label][number] += spent
        found.logged[label][number] += contender.logged - logged
        since[label] += spent
        if flush := contender.flush(since[label]):
            found.flushes[label] += flush
            since[label] = 0.0

    def every() -> Iterable[int]:
        for turn in range(rounds * epochs):
            if turn % epochs == 0:
                gc.collect()
            yield turn

    in_turns(list(contenders), every(), take)
    for label, contender in contenders.items():
        found.flushes[label] += contender.flush(float("inf"))
    return found


def warm(contender: Contender, seconds: float) -> None:
    """Trains as long as a run is special, whose first hundred updates are all logged; at most `seconds`."""
    spent, updates = 0.0, 0
    while not updates or (updates < FIRST_UPDATES and spent < seconds):
        spent += timed(contender)
        updates += contender.task.updates
    contender.flush(float("inf"))


def summary(label: Label, found: Timings, updates: int, reference: str) -> dict[str, Any]:
    """A contender's figures; its flushes are spread over its rounds by their length."""
    own = found.seconds[label]
    share = 1 + found.flushes[label] / sum(own)
    spread = [seconds * share for seconds in own]
    row: dict[str, Any] = {
        "median_ms": 1e3 * statistics.median(spread) / updates,
        "min_ms": 1e3 * min(spread) / updates,
    }
    row |= ratio_of(spread, found.seconds[label[0], reference], found.logged[label])
    return row | {"flush_share": share - 1}


def checked(
    kinds: Iterable[type[Contender]], task: Task, saved: int = 0
) -> tuple[dict[str, float], dict[str, str], dict[str, str]]:
    """By contender: the error of its first gradient; why it is left out; or why it is refused.

    The first of `kinds` is the reference. `saved` are the bytes that a micro-batch keeps for backward.
    """
    reference: list[Tensor] = []
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    refused: dict[str, str] = {}
    for kind in kinds:
        # Twice: in float64.
        if kind is SingleBatch and (reason := _too_large(task, 2 * task.steps * saved)):
            left_out[kind.name] = reason
            continue
        try:
            gradient = first_gradient(kind, task)
            reference = reference or gradient
            errors[kind.name] = relative_error(kind.name, gradient, reference)
        except ModuleNotFoundError as error:
            left_out[kind.name] = not_installed(error)
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
    kinds: Sequence[type[Contender]],
    task: Task,
    seconds: float,
    one: OneMicroBatch,
    rounds: int | None = None,
    updates: int | None = None,
) -> dict[str, Any]:
    """The figures of all contenders on `task`, the first of whom is what the others are held against."""
    return measured_together(kinds, [(task, one)], seconds, rounds, updates)[0]


def measured_together(
    kinds: Sequence[type[Contender]],
    tasks: Sequence[tuple[Task, OneMicroBatch]],
    seconds: float,
    rounds: int | None = None,
    updates: int | None = None,
) -> Rows:
    """The figures of all contenders on every task, a cell each.

    All take turns with all, so that the times of one task can be held against those of another: `times` is
    the median over rounds of an update's time over that of the first task's.
    """
    checks = [checked(kinds, task, one.saved) for task, one in tasks]
    plans = [planned(task, task.steps * one.seconds, seconds, rounds, updates) for task, one in tasks]
    contenders: dict[Label, Contender] = {}
    for number, ((task, _), plan, (errors, _, _)) in enumerate(zip(tasks, plans, checks, strict=True)):
        whole = replace(task, samples=plan.updates * task.batch)
        contenders |= {(number, kind.name): built(kind, whole) for kind in kinds if kind.name in errors}
    most = min(plan.rounds for plan in plans)
    found = timings(contenders, most, max(plan.epochs for plan in plans), min(WARM_UP_SECONDS, seconds))
    cells: Rows = []
    for number, ((task, _), plan, (errors, left_out, refused)) in enumerate(
        zip(tasks, plans, checks, strict=True)
    ):
        count = plan.epochs * plan.updates
        rows: dict[str, dict[str, Any]] = {}
        for name in errors:
            label, contender = (number, name), contenders.pop((number, name))
            rows[name] = summary(label, found, count, kinds[0].name)
            if first := found.seconds.get((0, name)):
                shorter = plans[0].epochs * plans[0].updates / count
                rows[name]["times"] = shorter * ratio_of(found.seconds[label], first)["ratio"]
            rows[name] |= {"saved_mib": saved_bytes(contender) / MIB, "gradient_error": errors[name]}
            rows[name] |= {"seconds": found.seconds[label]}
            contender.close()
        cells.append({"model": task.model, "micro_batch": task.micro_batch, "steps": task.steps})
        cells[-1] |= {"updates": count, "rounds": most, "turns": plan.epochs}
        cells[-1] |= {"contenders": rows, "skipped": left_out, "refused": refused}
    gc.collect()
    return cells
