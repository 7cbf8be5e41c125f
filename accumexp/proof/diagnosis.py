"""Why a window is not the larger batch: one suspect changed at a time, and what becomes of the error."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from .certificate import Cause, Check
from .coupling import NOTHING, Coupling, coupling_modules, loss_couples
from .gradients import DOUBLE, compare
from .larger_batch import norm
from .mixture import mixture, reading
from .observation import observe
from .problem import Batch, Problem, Start, cast, whole
from .randomness import Trial, trial
from .ranks import all_gather, ranks
from .rounding import expected, narrowed

ADVICE = {
    "statistics": "take a norm without statistics over samples (GroupNorm), or over groups that both share "
    "(ghost batch norm), or freeze the statistics",
    "loss": "compute the loss on all outputs of the window at once, then go back through the micro-batches "
    "(Gao et al., arXiv 2101.06983)",
}


def evaluating(problem: Problem, names: Sequence[str]) -> Problem:
    """`problem` with the named modules in eval mode."""
    model = copy.deepcopy(problem.model)
    for name in names:
        model.get_submodule("" if name == "(model)" else name).eval()
    return replace(problem, model=model)


def diagnose(problem: Problem, failed: Sequence[Check], batch: Batch, ragged: Sequence[Batch]) -> list[Cause]:
    """The causes of what failed in fp64, by experiment; empty if none was found."""
    seen = trial(problem, batch)
    repeated = trial(problem, batch)
    causes: list[Cause] = []
    if not seen.found.equal:
        unstable = abs(repeated.error - seen.error)
        if unstable > 1e-3 * seen.error:
            causes.extend(_unstable(problem, batch, seen))
        causes.extend(_coupled(problem, batch, seen))
        causes.extend(_loss(problem, batch, seen))
        if not causes:
            causes.extend(_mixed(problem, batch, seen))
    for other in ragged if not causes else ():
        found = trial(problem, other)
        if not found.found.equal:
            causes.extend(_mixed(problem, other, found))
        if causes:
            break
    return causes


def _coupled(problem: Problem, batch: Batch, seen: Trial) -> list[Cause]:
    coupling = coupling_modules(problem, batch)
    if not coupling:
        return []
    still = trial(evaluating(problem, [c.name for c in coupling]), batch)
    samples = problem.samples
    most = max((size for sizes in all_gather(seen.seen.sizes) for size in sizes), default=0)
    rest = f"in eval mode the gradient's error falls from {seen.error:.2g} to {still.error:.2g}"
    if not still.found.equal:
        rest = f"in eval mode an error of {still.error:.2g} is left of {seen.error:.2g}"
    reason = f"statistics over {most} of {samples} samples"
    causes = []
    for kind in dict.fromkeys(c.kind for c in coupling):
        alike = [c for c in coupling if c.kind == kind]
        causes.append(
            Cause(
                "batch statistics",
                f"{_names(alike)} ({kind})",
                reason,
                seen.error,
                f"its output on half the batch is off by {max(c.effect for c in alike):.2g}; {rest}",
                ADVICE["statistics"],
            )
        )
    return causes


def _names(alike: list[Coupling]) -> str:
    names = [c.name for c in alike]
    if len(names) <= 3:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, ... {names[-1]}: {len(names)} modules"


def _loss(problem: Problem, batch: Batch, seen: Trial) -> list[Cause]:
    effect = loss_couples(problem, batch)
    if not effect > NOTHING:
        return []
    kind = getattr(problem.loss, "__name__", type(problem.loss).__name__)
    return [
        Cause(
            "coupling loss",
            f"loss ({kind})",
            "couples samples: a sample's term depends on the other samples of its micro-batch",
            seen.error,
            f"the gradient at one half's outputs moves by {effect:.2g} when only the other half's change",
            ADVICE["loss"],
        )
    ]


def _mixed(problem: Problem, batch: Batch, seen: Trial) -> list[Cause]:
    found = seen.seen.gradient
    if not all(all_gather(found is not None)):
        return [_cause("no update", "the optimizer was not stepped in the window", seen, "", "step it once")]
    assert found is not None
    model = narrowed(problem.model, DOUBLE)
    right = expected(problem, cast(batch, DOUBLE), model)
    if problem.clip_norm is not None and right.size > problem.clip_norm:
        factor = problem.clip_norm / (right.size + 1e-6)
        found = {name: g / factor for name, g in found.items()}
    mixed = mixture(problem, batch, model, found, seen.seen.micro_batches)
    causes = []
    if mixed is not None and mixed.explains and not mixed.right:
        reason, advice = reading(problem, mixed, ranks())
        shown = f"the micro-batches' own gradients times those counts leave {mixed.left:.1g} of it"
        causes.append(_cause("wrong denominator", reason, seen, shown, advice))
    # Ranks whose gradients differ would read them differently, and wait for each other for ever.
    return all_gather(causes)[0]


def carried(problem: Problem, batches: Sequence[Batch]) -> list[Cause]:
    """Whether a second window has the first one's gradient in it."""
    start = Start(problem, DOUBLE)
    first = observe(start, cast(batches[0], DOUBLE))
    model = narrowed(problem.model, DOUBLE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(whole(start.parameters()[name]))
    second = observe(start, cast(batches[1], DOUBLE))
    if not all(all_gather(first.gradient is not None and second.gradient is not None)):
        return []
    assert first.gradient is not None and second.gradient is not None
    right = expected(problem, cast(batches[1], DOUBLE), model, problem.clip_norm)
    if compare(second.gradient, right).equal:
        return []
    mixed = mixture(problem, batches[1], model, second.gradient, second.micro_batches, first.gradient)
    if mixed is None or not mixed.explains or (mixed.alike and abs(mixed.before) <= 1e-6):
        return []
    reason, advice = reading(problem, mixed, ranks())
    error = norm(first.gradient) * abs(mixed.before) / (norm(second.gradient) or 1.0)
    return [Cause("wrong denominator", "", reason, error, f"the mixture leaves {mixed.left:.1g}", advice)]


def _cause(source: str, reason: str, seen: Trial, shown: str, advice: str) -> Cause:
    return Cause(source, "", reason, seen.error, shown, advice)


def _unstable(problem: Problem, batch: Batch, seen: Trial) -> list[Cause]:
    """Kernels that give another result each time: shown by forbidding them."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        still = trial(problem, batch)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    if not still.found.equal:
        return [
            Cause(
                "unrepeatable",
                "",
                "the same window gives another gradient each time",
                seen.error,
                "with deterministic kernels too: something draws that is not of torch",
                "draw with torch, whose generators can be seeded",
            )
        ]
    return [
        Cause(
            "non-deterministic kernels",
            "",
            "the same window gives another gradient each time",
            seen.error,
            f"with deterministic kernels the error falls from {seen.error:.2g} to {still.error:.2g}",
            "torch.use_deterministic_algorithms(True), or accept what two runs of the larger batch differ by",
            excused=True,
        )
    ]


def of_buffers(problem: Problem, check: Check, updates: int) -> Cause:
    """Buffers that a window of `updates` micro-batches moved that often."""
    name = check.detail.removeprefix("worst at ")
    module = problem.model.get_submodule(name.rpartition(".")[0])
    momentum = getattr(module, "momentum", None)
    advice = "use buffers that do not follow the batch"
    if isinstance(momentum, float) and updates > 1:
        matching = 1 - (1 - momentum) ** (1 / updates)
        advice = f"momentum {matching:.4g} instead of {momentum:g} forgets at the same pace"
    return Cause(
        "buffers",
        f"{name.rpartition('.')[0] or '(model)'} ({type(module).__name__})",
        f"running statistics updated {updates} times an update",
        math.nan,
        f"after one window {name.rpartition('.')[2]} is off by {check.figure:.2g}",
        advice,
    )


def of_precision(problem: Problem, checks: Sequence[Check]) -> list[Cause]:
    """Gradients that were added in too low a precision, where fp64 adds the same ones right."""
    added = next((c for c in checks if c.name.startswith("addition") and not c.passed), None)
    if added is None or any(c.name == "gradient, fp64" and not c.passed for c in checks):
        return []
    name = str(problem.dtype).removeprefix("torch.")
    low = torch.finfo(problem.dtype).eps > torch.finfo(torch.float32).eps
    kept = f"added in {name}" if low else f"kept in less than {name}"
    return [
        Cause(
            "low-precision accumulation",
            "",
            f"{problem.steps} gradients are {kept}, off by {added.figure:.2g} where rounding the "
            f"sum once gives {added.bound:.2g}",
            added.figure,
            "in fp64 the same window is the larger batch",
            "add in fp32 and round once: accum.fp32_buffers=true",
        )
    ]


def never_clipped(most: float) -> Cause:
    """What is said of clipping that no window was long enough for."""
    return Cause(
        "clipping, which never acted",
        "",
        f"no gradient was longer than clip_norm={most:g}",
        math.nan,
        "",
        "give certify a clip_norm, and a loop that clips to it, below the gradient's norm",
        excused=True,
    )
