"""Causes of failed checks, by experiments that change one suspect at a time and measure the error again."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from .certificate import Cause, Check
from .coupling import NEGLIGIBLE, coupling_modules, loss_couples, whole_batch_outputs
from .float64 import DOUBLE
from .gradients import Comparison, compare, compare_window
from .larger_batch import norm
from .mixture import TOLERANCE, explanation, mixture
from .observation import Observation, observe
from .problem import Problem, TrainingState, WholeBatch, cast, copy_in
from .ranks import all_gather, world_size
from .rounding import ExpectedUpdate, expected_update

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
        shown = ", ".join(names)
        if len(names) > 3:
            shown = f"{names[0]}, {names[1]}, ... {names[-1]}: {len(names)} modules"
        causes.append(
            Cause(
                "batch statistics",
                f"{shown} ({kind})",
                f"statistics over {most} of {problem.samples} samples",
                error,
                f"its output on half the batch is off by {max(c.effect for c in same_kind):.2g}; {effect}",
                WITHOUT_STATISTICS,
            )
        )
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
    return [
        Cause(
            "coupling loss",
            f"loss ({name})",
            "couples samples: a sample's term depends on the other samples of its micro-batch",
            error,
            f"the gradient at one half's outputs moves by {effect:.2g} when only the other half's change",
            WHOLE_WINDOW_LOSS,
        )
    ]


def _denominators(problem: Problem, batch: WholeBatch, window: Window) -> list[Cause]:
    comparison, observation, expected = window
    gradient = observation.gradient
    if not all(all_gather(gradient is not None)):
        reason = "the optimizer was not stepped in the window"
        return [Cause("no update", "", reason, comparison.error, "", "step it once")]
    assert gradient is not None
    if problem.clip_norm is not None and expected.size > problem.clip_norm:
        factor = problem.clip_norm / (expected.size + 1e-6)
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
    return Cause(
        "non-deterministic kernels",
        "",
        reason,
        error,
        f"with deterministic kernels the error falls from {error:.2g} to {deterministic.error:.2g}",
        "torch.use_deterministic_algorithms(True), or accept what two runs of the larger batch differ by",
        excused=True,
    )


def buffers_cause(problem: Problem, check: Check, micro_batches: int) -> Cause:
    """The cause of a failed buffers check: each of `micro_batches` updates the buffers."""
    module_name, _, buffer = check.detail.removeprefix("worst at ").rpartition(".")
    module = problem.model.get_submodule(module_name)
    momentum = getattr(module, "momentum", None)
    advice = "use buffers that do not follow the batch"
    if isinstance(momentum, float) and micro_batches > 1:
        matching = 1 - (1 - momentum) ** (1 / micro_batches)
        advice = f"momentum {matching:.4g} instead of {momentum:g} forgets at the same pace"
    return Cause(
        "buffers",
        f"{module_name or '(model)'} ({type(module).__name__})",
        f"running statistics updated {micro_batches} times an update",
        math.nan,
        f"after one window {buffer} is off by {check.figure:.2g}",
        advice,
    )


def low_precision_causes(problem: Problem, failed: Sequence[Check]) -> list[Cause]:
    """The cause of a failed addition check, if the same gradients are added correctly in fp64."""
    addition = next((check for check in failed if check.name.startswith("addition")), None)
    if addition is None or any(check.name == "gradient, fp64" for check in failed):
        return []
    name = str(problem.dtype).removeprefix("torch.")
    low = torch.finfo(problem.dtype).eps > torch.finfo(torch.float32).eps
    kept = f"added in {name}" if low else f"kept in less than {name}"
    return [
        Cause(
            "low-precision accumulation",
            "",
            f"{problem.steps} gradients are {kept}, off by {addition.figure:.2g} where rounding the "
            f"sum once gives {addition.bound:.2g}",
            addition.figure,
            "in fp64 the same window is the larger batch",
            "add in fp32 and round once: accum.fp32_buffers=true",
        )
    ]


def never_clipped_cause(clip_norm: float) -> Cause:
    """The excused cause if no gradient was long enough to be clipped."""
    return Cause(
        "clipping, which never acted",
        "",
        f"no gradient was longer than clip_norm={clip_norm:g}",
        math.nan,
        "",
        "give certify a clip_norm, and a loop that clips to it, below the gradient's norm",
        excused=True,
    )
