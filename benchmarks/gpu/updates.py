"""The parts that train in this process: times and memory of updates, beside the hand-written loop's."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from accumexp.environment.memory import MIB

from ..accumexp_loop import Graphed, Untracked
from ..cell import Label, checked, summary, timings
from ..loops import Fused, HandWritten, Loop, built, timed
from ..measure import prepare
from ..memory import tensor_peak
from ..tasks import Task
from .session import Session

KINDS: tuple[type[Loop], ...] = (HandWritten, Fused, Untracked, Graphed)
LEAST_ROUNDS, MOST_ROUNDS = 7, 51
# Updates before timing. With graphs also the third logged update, of every hundred, has been recorded.
WARM_UP, WARM_UP_GRAPHED = 100, 300


@dataclass(frozen=True)
class Size:
    """A cell, and how it is timed.

    Attributes:
        updates: in a round.
        seconds: for all rounds of all loops.
    """

    model: str
    micro_batch: int
    steps: int
    updates: int
    seconds: float


SIZES = (Size("lenet5", 32, 4, 100, 15), Size("resnet18", 64, 4, 25, 20))
QUICK = (Size("lenet5", 4, 2, 2, 0.1),)


def window(session: Session) -> None:
    """Times of an update beside the hand-written loop's, without and with CUDA graphs, in turns."""
    prepare(None)
    for size in QUICK if session.quick else SIZES:
        name = f"{size.model} {size.steps}x{size.micro_batch}"
        with session.guarded(name):
            figures = cell(size, torch.device(session.device), KINDS)
            rows = figures["loops"]
            lines = [f"{name}: by hand {rows[HandWritten.name]['median_ms']:.3f} ms"]
            for kind in KINDS[1:]:
                if row := rows.get(kind.name):
                    spread = f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
                    lines.append(f"  {kind.name}: {row['ratio']:.3f} ({spread})")
            session.add(name, figures, *lines)
            # Without a GPU there are no graphs, and that is no failure.
            without = figures["left_out"] if session.device == "cuda" else {}
            for kind, reason in {**without, **figures["refused"]}.items():
                session.fail(f"{name}, {kind}: {reason}")
        gc.collect()


def cell(size: Size, device: torch.device, kinds: Sequence[type[Loop]]) -> dict[str, Any]:
    """Figures of all `kinds` that compute the first one's gradient, by name.

    A round is an epoch of `size.updates` updates, with a wait for the device before and after it.
    """
    task = Task(size.model, device, size.micro_batch, size.steps, size.micro_batch * size.steps)
    errors, left_out, refused = checked(kinds, task)
    whole = replace(task, samples=size.updates * task.batch)
    loops: dict[Label, Loop] = {(0, kind.name): built(kind, whole) for kind in kinds if kind.name in errors}
    round_seconds = 0.0
    for loop in loops.values():
        updates = WARM_UP_GRAPHED if isinstance(loop, Graphed) else WARM_UP
        for _ in range(-(-updates // size.updates) if size.updates >= 10 else 1):
            timed(loop)
        round_seconds += timed(loop)
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(size.seconds / round_seconds)))
    times = timings(loops, rounds, 1, warm_up=0)
    rows: dict[str, dict[str, Any]] = {}
    for label, loop in loops.items():
        rows[label[1]] = summary(label, times, size.updates, kinds[0].name)
        rows[label[1]] |= {"gradient_error": errors[label[1]], "seconds": times.seconds[label]}
        loop.close()
    figures = {"model": size.model, "micro_batch": size.micro_batch, "steps": size.steps}
    figures |= {"updates": size.updates, "rounds": rounds, "loops": rows}
    return figures | {"left_out": left_out, "refused": refused}


def memory(session: Session) -> None:
    """Peak memory of one update of the same batch, in 8 micro-batches and in 1.

    On a GPU it is what torch's allocator had given out at most, beyond what was there before the update:
    parameters, gradients, momentum and the data are there already.
    """
    prepare(None)
    sizes = {"lenet5": 32} if session.quick else {"lenet5": 4096, "resnet18": 1024}
    device = torch.device(session.device)
    for model, batch in sizes.items():
        for kind in (HandWritten, Untracked):
            name = f"{model}, {kind.name}"
            with session.guarded(name):
                figures: dict[str, Any] = {"batch": batch}
                for steps in (1, 8):
                    loop = built(kind, Task(model, device, batch // steps, steps, batch))
                    timed(loop)
                    peak = tensor_peak(device, loop.epoch) / MIB
                    figures[str(steps)] = {"peak_mib": peak}
                    if device.type == "cuda":
                        figures[str(steps)]["allocated_mib"] = torch.cuda.max_memory_allocated(device) / MIB
                    loop.close()
                    del loop
                    gc.collect()
                one, eight = (figures[steps]["peak_mib"] for steps in ("1", "8"))
                figures["ratio"] = eight / one
                line = f"{name}: {eight:.1f} MiB beside {one:.1f} MiB, {eight / one:.3f} of it"
                session.add(name, figures, f"{line} (batch {batch})")
                if eight >= one:
                    session.fail(f"{name}: 8 micro-batches need as much memory as 1")
