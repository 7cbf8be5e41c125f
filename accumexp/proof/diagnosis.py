"""Causes of failed checks, by experiments that change one suspect at a time and measure the error again.

Random draws are a cause in any case: they are held fixed by sample for all other checks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from .certificate import Cause, Check
from .coupling import NEGLIGIBLE, coupling_modules, loss_couples, whole_batch_outputs
from .fixed_draws import FixedDraws, fixed_draws, sample_dims
from .float64 import DOUBLE, keep_float64
from .gradients import Comparison, compare, compare_window
from .larger_batch import call, clip_factor, mean_loss, norm
from .mixture import TOLERANCE, explanation, mixture
from .module_tracker import LOSS, OUTSIDE
from .nested import batch_size, cloned
from .observation import Observation, observe
from .problem import Problem, TrainingState, WholeBatch, cast, copy_in, rows
from .ranks import all_gather, world_size
from .rounding import ExpectedUpdate, expected_update

REDRAWN = "none needed: a window has other draws, as another run of the larger batch would"
WITHOUT_STATISTICS = (
    "take a norm without statistics over samples (GroupNorm), or over groups that both share "
    "(ghost batch norm), or freeze the statistics"
)
WHOLE_WINDOW_LOSS = (
    "compute the loss on all outputs of the window at once, then go back through the micro-batches "
    "(Gao et al., arXiv 2101.06983)"
)
WHOLE_WINDOW_OUTPUT = (
    "return what it is computed from, a row for each sample, and compute it in the loss on all outputs of "
    "the window at once"
)
Window = tuple[Comparison, Observation, ExpectedUpdate]


def diagnose(problem: Problem, batch: WholeBatch, others: Sequence[WholeBatch]) -> list[Cause]:
    """The causes of gradient errors in fp64, on `batch` or else on `others`; empty if none is found."""
    window = compare_window(problem, batch)
    comparison = window[0]
    if not comparison.equal:
        causes: list[Cause] = []
        repeated, _, _ = compare_window(problem, batch)
        if abs(repeated.error - comparison.error) > 1e-3 * comparison.error:
            causes.append(_unrepeatable(problem, batch, comparison.error))
        causes.extend(_coupled(problem, batch, window))
        causes.extend(_coupling_loss(problem, batch, comparison.error))
        if causes := causes or _denominators(problem, batch, window):
            return causes
    for other in others:
        window = compare_window(problem, other)
        if not window[0].equal and (causes := _denominators(problem, other, window)):
            return causes
    return []


def _coupled(problem: Problem, batch: WholeBatch, window: Window) -> list[Cause]:
    couplings = coupling_modules(problem, batch)
    if not couplings:
        return []
    model = copy.deepcopy(problem.model)
    for coupling in couplings:
        model.get_submodule("" if coupling.name == "(model)" else coupling.name).eval()
    in_eval, _, _ = compare_window(replace(problem, model=model), batch)
    error = window[0].error
    effect = f"in eval mode the gradient's error falls from {error:.2g} to {in_eval.error:.2g}"
    if not in_eval.equal:
        effect = f"in eval mode an error of {in_eval.error:.2g} is left of {error:.2g}"
    most = max((size for sizes in all_gather(window[1].sizes) for size in sizes), default=0)
    causes = []
    for kind in dict.fromkeys(coupling.kind for coupling in couplings):
        same_kind = [coupling for coupling in couplings if coupling.kind == kind]
        names = [coupling.name for coupling in same_kind]
        where = ", ".join(names)
        if len(names) > 3:
            where = f"{names[0]}, {names[1]}, ... {names[-1]}: {len(names)} modules"
        where += f" ({kind})"
        reason = f"statistics over {most} of {problem.samples} samples"
        shown = f"its output on half the batch is off by {max(c.effect for c in same_kind):.2g}; {effect}"
        causes.append(Cause("batch statistics", where, reason, error, shown, WITHOUT_STATISTICS))
    return causes


def _coupling_loss(problem: Problem, batch: WholeBatch, error: float) -> list[Cause]:
    if outputs := whole_batch_outputs(problem, batch):
        name = type(problem.model).__name__
        return [
            Cause(
                "coupling output",
                f"(model) ({name}), output{' and output'.join(outputs)}",
                "couples samples: a value of the whole micro-batch, not of each sample, enters the loss",
                error,
                "the loss's gradient at it is not 0",
                WHOLE_WINDOW_OUTPUT,
            )
        ]
    effect = loss_couples(problem, batch)
    if not effect > NEGLIGIBLE:
        return []
    name = getattr(problem.loss, "__name__", type(problem.loss).__name__)
    reason = "couples samples: a sample's term depends on the other samples of its micro-batch"
    shown = f"the gradient at one half's outputs moves by {effect:.2g} when only the other half's change"
    return [Cause("coupling loss", f"loss ({name})", reason, error, shown, WHOLE_WINDOW_LOSS)]


def _denominators(problem: Problem, batch: WholeBatch, window: Window) -> list[Cause]:
    comparison, observation, expected = window
    gradient = observation.gradient
    if not all(all_gather(gradient is not None)):
        reason = "the optimizer was not stepped in the window"
        return [Cause("no update", "", reason, comparison.error, "", "step it once")]
    assert gradient is not None
    factor = clip_factor(expected.size, problem.clip_norm)
    if factor < 1:
        gradient = {name: g / factor for name, g in gradient.items()}
    model = copy_in(problem.model, DOUBLE)
    mixed = mixture(problem, batch, model, gradient, observation.micro_batches)
    causes = []
    if mixed is not None and mixed.explains and not mixed.correct:
        reason, advice = explanation(problem, mixed, world_size())
        shown = f"the micro-batches' own gradients times those counts leave {mixed.residual:.1g} of it"
        causes.append(Cause("wrong denominator", "", reason, comparison.error, shown, advice))
    # The first rank's causes for all: ranks with different gradients would read them differently, and then
    # wait for each other forever.
    return all_gather(causes)[0]


def gradient_carried_over(problem: Problem, batches: Sequence[WholeBatch]) -> list[Cause]:
    """The cause if a second window's gradient contains the first one's."""
    state = TrainingState(problem, DOUBLE)
    first = observe(state, cast(batches[0], DOUBLE))
    model = state.model_in(DOUBLE)
    second = observe(state, cast(batches[1], DOUBLE))
    if not all(all_gather(first.gradient is not None and second.gradient is not None)):
        return []
    assert first.gradient is not None and second.gradient is not None
    expected = expected_update(problem, batches[1], model, problem.clip_norm)
    if compare(second.gradient, expected).equal:
        return []
    mixed = mixture(problem, batches[1], model, second.gradient, second.micro_batches, first.gradient)
    if mixed is None or not mixed.explains or (mixed.uniform and abs(mixed.previous) <= TOLERANCE):
        return []
    reason, advice = explanation(problem, mixed, world_size())
    error = norm(first.gradient) * abs(mixed.previous) / (norm(second.gradient) or 1.0)
    shown = f"the mixture leaves {mixed.residual:.1g}"
    return [Cause("wrong denominator", "", reason, error, shown, advice)]


def _unrepeatable(problem: Problem, batch: WholeBatch, error: float) -> Cause:
    """Whether deterministic kernels make the window repeatable."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic, _, _ = compare_window(problem, batch)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    reason = "the same window gives another gradient each time"
    if not deterministic.equal:
        shown = "with deterministic kernels too: something draws that is not of torch"
        advice = "draw with torch, whose generators can be seeded"
        return Cause("unrepeatable", "", reason, error, shown, advice)
    shown = f"with deterministic kernels the error falls from {error:.2g} to {deterministic.error:.2g}"
    advice = "torch.use_deterministic_algorithms(True), or accept what two runs of the larger batch differ by"
    return Cause("non-deterministic kernels", "", reason, error, shown, advice, excused=True)


def buffers_cause(problem: Problem, check: Check, micro_batches: int) -> Cause:
    """The cause of a failed buffers check: each of `micro_batches` updates the buffers."""
    module_name, _, buffer = check.detail.removeprefix("worst at ").rpartition(".")
    module = problem.model.get_submodule(module_name)
    momentum = getattr(module, "momentum", None)
    advice = "use buffers that do not follow the batch"
    if isinstance(momentum, float) and micro_batches > 1:
        matching = 1 - (1 - momentum) ** (1 / micro_batches)
        advice = f"momentum {matching:.4g} instead of {momentum:g} forgets at the same pace"
    where = f"{module_name or '(model)'} ({type(module).__name__})"
    reason = f"running statistics updated {micro_batches} times an update"
    shown = f"after one window {buffer} is off by {check.figure:.2g}"
    return Cause("buffers", where, reason, math.nan, shown, advice)


def low_precision_causes(problem: Problem, failed: Sequence[Check]) -> list[Cause]:
    """The cause of a failed addition check, if the same gradients are added correctly in fp64."""
    addition = next((check for check in failed if check.name.startswith("addition")), None)
    if addition is None or any(check.name == "gradient, fp64" for check in failed):
        return []
    name = str(problem.dtype).removeprefix("torch.")
    low = torch.finfo(problem.dtype).eps > torch.finfo(torch.float32).eps
    kept = f"added in {name}" if low else f"kept in less than {name}"
    error = f"off by {addition.figure:.2g} where rounding the sum once gives {addition.bound:.2g}"
    reason = f"{problem.steps} gradients are {kept}, {error}"
    shown = "in fp64 the same window is the larger batch"
    advice = "add in fp32 and round once: accum.fp32_buffers=true"
    return [Cause("low-precision accumulation", "", reason, addition.figure, shown, advice)]


def never_clipped_cause(clip_norm: float) -> Cause:
    """The excused cause if no gradient was long enough to be clipped."""
    reason = f"no gradient was longer than clip_norm={clip_norm:g}"
    advice = "give certify a clip_norm, and a loop that clips to it, below the gradient's norm"
    return Cause("clipping, which never acted", "", reason, math.nan, "", advice, excused=True)


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
    fixed = replace(problem, fixed_draws=True, sample_dims=dims)
    comparison, observation, _ = compare_window(problem, batch)
    if comparison.equal and problem.steps * world_size() == 1:
        return fixed, []  # a window of one micro-batch draws what the larger batch draws
    error, error_fixed = comparison.error, compare_window(fixed, batch)[0].error
    drawing = sorted(draws.operators)
    modules = [name for name in drawing if not name.startswith("(")]
    kinds = {name: type(problem.model.get_submodule(name)).__name__ for name in modules}
    where = ", ".join(f"{name} ({kinds[name]})" if name in kinds else name for name in drawing[:4])
    if len(drawing) > 4:
        where += f" and {len(drawing) - 4} more"
    source = "dropout draws" if any("ropout" in kind for kind in kinds.values()) else "random draws"
    reason = "random draws depend on how the batch is split"
    falls = f"the gradient's error falls from {error:.2g} to {error_fixed:.2g}"
    shown = f"with the same draws for every sample {falls}"
    causes = [Cause(source, where, reason, error, shown, REDRAWN, excused=True)]
    repeated = max(len(states) - len(set(states)) for states in all_gather(observation.random_states))
    if repeated and modules:  # a loss may be computed after all forward passes
        reason = f"{repeated} micro-batches draw what another one of their window has drawn"
        shown = "torch's generator is in the same state when their forward passes begin"
        causes.append(Cause("repeated draws", where, reason, math.nan, shown, "do not seed within a window"))
    return fixed, causes


def unfixed_draws_cause(draws: FixedDraws) -> Cause:
    """The cause for draws that cannot be held fixed, which may hide other errors."""
    operators = ", ".join(sorted(draws.unfixed))
    where = ", ".join(sorted(name for name, names in draws.operators.items() if names & draws.unfixed))
    reason = f"draws of {operators} cannot be held fixed by sample, so nothing is certified"
    advice = "leave these draws out for the proof, or make them of rand, randn, bernoulli or exponential_"
    return Cause("random draws", where, reason, math.nan, "", advice)
