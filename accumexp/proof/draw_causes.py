"""Random draws as causes: which modules draw, and what is left once their draws are held fixed."""

from __future__ import annotations

import math
from dataclasses import replace

from .certificate import Cause
from .fixed_draws import FixedDraws, fixed_draws, sample_dims
from .float64 import DOUBLE, keep_float64
from .gradients import compare_window
from .larger_batch import call, mean_loss
from .module_tracker import LOSS, OUTSIDE
from .nested import batch_size, cloned
from .observation import Observation
from .problem import Problem, WholeBatch, cast, copy_in, rows
from .ranks import all_gather, world_size

REDRAWN = "none needed: a window has other draws, as another run of the larger batch would"


def find_draws(problem: Problem, batch: WholeBatch) -> FixedDraws:
    """What draws in a forward pass on `batch`, and in the loss."""
    model = copy_in(problem.model, DOUBLE)
    inputs, targets = batch = cloned(cast(batch, DOUBLE))
    with (
        problem.loss_in(DOUBLE) as loss,
        keep_float64(DOUBLE),
        fixed_draws(model, batch, problem.seed) as draws,
    ):
        mean_loss(loss, call(model, inputs), targets)
    if OUTSIDE in draws.operators:
        draws.operators[LOSS] = draws.operators.pop(OUTSIDE)
    return draws


def fix_draws(problem: Problem, batch: WholeBatch, draws: FixedDraws) -> tuple[Problem, list[Cause]]:
    """(the problem with its draws held fixed, the draws as causes).

    They are a cause even where a generator happens to give a window's micro-batches one after the other
    what it gives the larger batch at once, as it may for a single layer on a CPU.
    """
    dims: dict[str, int | None] = {}
    if (size := batch_size(batch)) > 2:
        # A second pass with a sample less shows which dimension of a draw indexes samples.
        dims = sample_dims(draws.shapes, find_draws(problem, rows(batch, slice(0, size - 1))).shapes)
    drawing = sorted(draws.operators)
    modules = [name for name in drawing if not name.startswith("(")]
    kinds = {name: type(problem.model.get_submodule(name)).__name__ for name in modules}
    where = ", ".join(f"{name} ({kinds[name]})" if name in kinds else name for name in drawing[:4])
    if len(drawing) > 4:
        where += f" and {len(drawing) - 4} more"
    in_forward = any(name not in (LOSS, OUTSIDE) for name in drawing)
    fixed = replace(problem, fixed_draws=True, sample_dims=dims, drawing=where if in_forward else "")
    comparison, observation, _ = compare_window(problem, batch)
    if comparison.equal and problem.steps * world_size() == 1:
        return fixed, []  # a window of one micro-batch draws what the larger batch draws
    error, error_fixed = comparison.error, compare_window(fixed, batch)[0].error
    source = "dropout draws" if any("ropout" in kind for kind in kinds.values()) else "random draws"
    reason = "random draws depend on how the batch is split"
    if any(dim is None for dim in dims.values()):
        reason += "; some are shared by all samples of a micro-batch: the window has one for each"
    falls = f"the gradient's error falls from {error:.2g} to {error_fixed:.2g}"
    shown = f"with the same draws for every sample {falls}"
    if comparison.equal:
        shown = "the first window's micro-batches happen to draw what the larger batch draws"
    causes = [Cause(source, where, reason, error, shown, REDRAWN, excused=True)]
    repeated = repeated_draws(fixed, observation)
    if repeated:
        causes.append(repeated_draws_cause(fixed, repeated))
    return fixed, causes


def repeated_draws(problem: Problem, observation: Observation) -> int:
    """The number of micro-batches that draw what another one of their window has drawn. Collective.

    0 where only the loss draws: it may be computed after all forward passes.
    """
    if not problem.drawing:
        return 0
    return max(len(states) - len(set(states)) for states in all_gather(observation.random_states))


def repeated_draws_cause(problem: Problem, repeated: int, when: str = "") -> Cause:
    reason = f"{repeated} micro-batches draw what another one of their window has drawn"
    shown = "torch's generator is in the same state when their forward passes begin"
    reason = ", ".join(filter(None, (reason, when)))
    advice = "do not seed within a window"
    return Cause("repeated draws", problem.drawing, reason, math.nan, shown, advice)


def unfixed_draws_cause(draws: FixedDraws) -> Cause:
    """The cause for draws that cannot be held fixed, which may hide other errors."""
    operators = ", ".join(sorted(draws.unfixed))
    where = ", ".join(sorted(name for name, names in draws.operators.items() if names & draws.unfixed))
    reason = f"draws of {operators} cannot be held fixed by sample, so nothing is certified"
    advice = "leave these draws out for the proof, or make them of rand, randn, bernoulli or exponential_"
    return Cause("random draws", where, reason, math.nan, "", advice)


def never_clipped_cause(clip_norm: float) -> Cause:
    """The excused cause if no gradient was long enough to be clipped."""
    reason = f"no gradient was longer than clip_norm={clip_norm:g}"
    advice = "give certify a clip_norm, and a loop that clips to it, below the gradient's norm"
    return Cause("clipping, which never acted", "", reason, math.nan, "", advice, excused=True)
