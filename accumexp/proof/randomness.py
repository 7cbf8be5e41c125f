"""What a model draws at random: found, held fixed by sample, and named where that is not enough."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..accum.batch import batch_size
from .certificate import Cause
from .fixed_draws import dimensions, fixed_draws
from .float64 import computing
from .gradients import DOUBLE, Compared, compare
from .larger_batch import call
from .observation import Observation, observe
from .problem import Batch, Problem, Start, cast, rows
from .ranks import all_gather, ranks
from .rounding import expected, narrowed

ADVICE = "none needed: a window draws anew by micro-batch, as another run of the larger batch would"


@dataclass(frozen=True)
class Trial:
    """One window of a problem beside the larger batch, in fp64."""

    found: Compared
    seen: Observation

    @property
    def error(self) -> float:
        return self.found.error


def trial(problem: Problem, batch: Batch) -> Trial:
    batch = cast(batch, DOUBLE)
    start = Start(problem, DOUBLE)
    right = expected(problem, batch, narrowed(problem.model, DOUBLE), problem.clip_norm)
    seen = observe(start, batch)
    return Trial(compare(seen.gradient, right), seen)


def drawing_modules(
    problem: Problem, batch: Batch
) -> tuple[dict[str, set[str]], set[str], dict[str, int | None]]:
    """What draws in a pass over `batch`: operators by module, those that cannot be held fixed, and `dims`.

    A second pass with a sample less tells which dimension of a draw has the samples.
    """
    drawn, unknown, shapes = _drawn(problem, batch)
    dims: dict[str, int | None] = {}
    if drawn and (size := batch_size(batch)) > 2:
        dims = dimensions(shapes, _drawn(problem, rows(batch, slice(0, size - 1)))[2])
    return drawn, unknown, dims


def _drawn(problem: Problem, batch: Batch) -> tuple[dict[str, set[str]], set[str], dict[str, torch.Size]]:
    model = narrowed(problem.model, DOUBLE)
    given = cast(batch, DOUBLE)
    with torch.no_grad(), computing(DOUBLE), fixed_draws(model, given, problem.seed) as draws:
        call(model, given[0])
    return draws.drawn, draws.unknown, draws.shapes


def why_draws(
    problem: Problem, batch: Batch, drawn: dict[str, set[str]], dims: dict[str, int | None]
) -> tuple[Problem, list[Cause]]:
    """The problem with its draws held fixed, and the draws as a cause.

    They are one even where a generator happens to give a window's micro-batches one after the other what
    it gives the larger batch at once: one layer on a CPU may have that luck.
    """
    free = trial(problem, batch)
    held = replace(problem, fixed=True, dims=dims)
    if free.found.equal and problem.steps * ranks() == 1:
        return held, []  # a window of one micro-batch draws what the larger batch draws
    fixed = trial(held, batch)
    kinds = {name: type(problem.model.get_submodule(name)).__name__ for name in drawn if name[0] != "("}
    shown = sorted(drawn)
    where = ", ".join(f"{name} ({kinds[name]})" if name in kinds else name for name in shown[:4])
    if len(shown) > 4:
        where += f" and {len(shown) - 4} more"
    cause = Cause(
        "dropout draws" if any("ropout" in kind for kind in kinds.values()) else "random draws",
        where,
        "random draws depend on how the batch is split",
        free.error,
        f"with the same draws for every sample the gradient's error falls from {free.error:.2g} "
        f"to {fixed.error:.2g}",
        ADVICE,
        excused=True,
    )
    return held, [cause, *_repeated(free, where)]


def _repeated(free: Trial, where: str) -> list[Cause]:
    """Micro-batches that draw from the same state of the generator: the same masks once more."""
    every = [len(seen) - len(set(seen)) for seen in all_gather(free.seen.random)]
    if not max(every):
        return []
    return [
        Cause(
            "repeated draws",
            where,
            f"{max(every)} micro-batches draw what another one of their window has drawn",
            math.nan,
            "torch's generator is in the same state when their forward passes begin",
            "do not seed within a window",
        )
    ]


def unheld(drawn: dict[str, set[str]], unknown: set[str]) -> Cause:
    """Draws that could not be held fixed: what else is wrong cannot be told from them."""
    return Cause(
        "random draws",
        ", ".join(sorted(name for name, operators in drawn.items() if operators & unknown)),
        f"draws of {', '.join(sorted(unknown))} cannot be held fixed by sample, so nothing is certified",
        math.nan,
        "",
        "leave these draws out for the proof, or make them of rand, randn, bernoulli or exponential_",
    )
