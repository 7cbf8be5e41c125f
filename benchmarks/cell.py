"""One cell of a benchmark: contenders on one task, checked against each other, then timed in turns."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import torch
from torch import Tensor

from accumexp.system import MIB
from accumexp.trainer import FIRST_UPDATES

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
from .measure import in_turns, not_installed, ratio_of
from .tasks import Task, own_samples

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

    seconds: dict[str, list[float]] = field(default_factory=dict)
    logged: dict[str, list[int]] = field(default_factory=dict)
    flushes: dict[str, float] = field(default_factory=dict)


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


def timings(contenders: Sequence[Contender], plan: Plan, warm_up: float = WARM_UP_SECONDS) -> Timings:
    """Times of all contenders, who take turns epoch by epoch.

    What a contender does every few seconds, not in every round, is done when its own time has come, and
    once at the end.
    """
    found = Timings()
    since: dict[str, float] = {}
    for contender in contenders:
        name = contender.name
        found.seconds[name], found.logged[name] = [0.0] * plan.rounds, [0] * plan.rounds
        found.flushes[name] = since[name] = 0.0
        warm(contender, warm_up)

    def take(contender: Contender, turn: int) -> None:
        name, number = contender.name, turn // plan.epochs
        logged = contender.logged
        spent = timed(contender)
        found.seconds[name][number] += spent
        found.logged[name][number] += contender.logged - logged
        since[name] += spent
        if flush := contender.flush(since[name]):
            found.flushes[name] += flush
            since[name] = 0.0

    def every() -> Iterable[int]:
        for turn in range(plan.rounds * plan.epochs):
            if turn % plan.epochs == 0:
                gc.collect()
            yield turn

    in_turns(contenders, every(), take)
    for contender in contenders:
        found.flushes[contender.name] += contender.flush(float("inf"))
    return found


def warm(contender: Contender, seconds: float) -> None:
    """Trains as long as a run is special, whose first hundred updates are all logged; at most `seconds`."""
    spent, updates = 0.0, 0
    while not updates or (updates < FIRST_UPDATES and spent < seconds):
        spent += timed(contender)
        updates += contender.task.updates
    contender.flush(float("inf"))


def summary(name: str, found: Timings, updates: int, reference: str) -> dict[str, Any]:
    """A contender's figures; its flushes are spread over its rounds by their length."""
    own = found.seconds[name]
    share = 1 + found.flushes[name] / sum(own)
    spread = [seconds * share for seconds in own]
    row: dict[str, Any] = {
        "median_ms": 1e3 * statistics.median(spread) / updates,
        "min_ms": 1e3 * min(spread) / updates,
    }
    row |= ratio_of(spread, found.seconds[reference], found.logged[name])
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
    errors, left_out, refused = checked(kinds, task, one.saved)
    plan = planned(task, task.steps * one.seconds, seconds, rounds, updates)
    whole = replace(task, samples=plan.updates * task.batch)
    contenders = [built(kind, whole) for kind in kinds if kind.name in errors]
    found = timings(contenders, plan, min(WARM_UP_SECONDS, seconds))
    count = plan.epochs * plan.updates
    rows: dict[str, dict[str, Any]] = {}
    for contender in contenders:
        name = contender.name
        rows[name] = summary(name, found, count, kinds[0].name)
        rows[name] |= {"saved_mib": saved_bytes(contender) / MIB, "gradient_error": errors[name]}
        rows[name] |= {"seconds": found.seconds[name]}
        contender.close()
    cell = {"model": task.model, "micro_batch": task.micro_batch, "steps": task.steps}
    cell |= {"updates": count, "rounds": plan.rounds, "turns": plan.epochs}
    del contenders
    gc.collect()
    return cell | {"contenders": rows, "skipped": left_out, "refused": refused}
