"""Windows of two passes: whether each micro-batch's second forward pass repeats the draws of the first."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .certificate import Cause, Check
from .compilation import outside_graphs
from .float64 import DOUBLE
from .nested import tensors
from .observation import observe
from .problem import Problem, TrainingState, WholeBatch, cast
from .ranks import all_gather
from .sample_ids import SampleIds

NAME = "second forward pass"
# Relative difference in fp64 of the same outputs on other shapes, far below that of other draws.
ROUNDING = 1e-9
SAME_OUTPUTS = (
    "a micro-batch that is passed without a backward and then with one has the same outputs both times"
)


def second_pass_check(problem: Problem, batch: WholeBatch) -> Check | None:
    """Compares outputs with those of earlier passes without a backward. A collective call.

    Made where the model draws and the loss has several terms or couples samples: it may then be computed on
    outputs of the first pass and differentiated at those of the second. None for a window of one pass.
    """
    if not problem.drawing or not (problem.terms or problem.couples):
        return None
    state = TrainingState(replace(problem, fixed_draws=False), DOUBLE)
    batch = cast(batch, DOUBLE)
    ids = SampleIds(batch[0], None, batch[1])
    passes: list[_Pass] = []

    def after_forward(module: nn.Module, arguments: Any, keywords: Any, outputs: Any) -> None:
        floats = [tensor for tensor in tensors(outputs) if tensor.is_floating_point()]
        samples = tuple(ids.find([arguments, keywords]) or ())
        begun = _Pass(samples, [tensor.detach().clone() for tensor in floats], module.training)
        passes.append(begun)
        for tensor in floats:
            if tensor.grad_fn is not None:
                tensor.register_hook(lambda _: setattr(begun, "backward", True))

    with state.inner.register_forward_hook(outside_graphs(after_forward), with_kwargs=True):
        observe(state, batch)
    differences: list[tuple[float, str]] = []
    first: dict[tuple[int, ...], list[Tensor]] = {}
    for each in passes:
        if each.backward and each.samples in first:
            named = ", ".join(map(str, each.samples[:3])) + (", ..." if len(each.samples) > 3 else "")
            differences.append((_difference(each.outputs, first[each.samples]), f"worst for samples {named}"))
        elif each.training:
            first[each.samples] = each.outputs
    every = [worst for worst in all_gather(max(differences, default=None)) if worst is not None]
    if not every:
        return None
    figure, detail = max(every)
    return Check(NAME, figure, ROUNDING, "relative", SAME_OUTPUTS, detail)


@dataclass
class _Pass:
    """A forward pass in training mode or not, and whether a gradient came back to it."""

    samples: tuple[int, ...]
    outputs: list[Tensor]
    training: bool
    backward: bool = False


def _difference(values: list[Tensor], first: list[Tensor]) -> float:
    pairs = list(zip(values, first, strict=True))
    size = math.sqrt(sum(float(b.square().sum()) for _, b in pairs)) or 1.0
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs)) / size


def second_pass_cause(problem: Problem, check: Check) -> Cause:
    reason = (
        "the second forward pass of a micro-batch draws otherwise than the first, whose outputs the loss is "
        f"computed on: they differ by {check.figure:.2g}"
    )
    advice = "restore the state of torch's generators before each second pass"
    return Cause("other draws", problem.drawing, reason, math.nan, check.detail, advice)
