"""What a loop that has just begun makes of the window that failed, from the weights before it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .counts import Decomposition
from .deliveries import delivered_in_words, places_in_words
from .evidence import Failure
from .float64 import DOUBLE
from .larger_batch import Gradient, norm
from .nested import batch_size, tensors
from .observation import observe
from .problem import Problem, TrainingState, cast
from .ranks import world_size
from .rounding import larger_batch_of

# Relative error up to which outputs are the same: in fp64, or in fp32 where the model computes in it.
SAME = 1e-5
OVER_A_MICRO_BATCH = "something is computed over a micro-batch that should be computed over the window"


def gradient_of_new_loop(problem: Problem, parts: Decomposition, steps: int) -> Gradient | None:
    """The gradient of the failing batch in `steps` micro-batches.

    None if the loop fails on it, or if there are several ranks.
    """
    if parts.ranks > 1:
        return None
    try:
        gradient = observe(_new(problem, parts.failure, steps), cast(parts.failure.batch, DOUBLE)).gradient
    except Exception:
        return None
    return None if gradient is None else {name: g.double() for name, g in gradient.items()}


def new_loop_in_words(problem: Problem, failure: Failure, parts: Decomposition) -> str:
    """Whether a new loop is right, with as many micro-batches or with one, and where its outputs differ.

    "" if that is not known.
    """
    expected = failure.expected.gradient

    def error(steps: int) -> float:
        made = gradient_of_new_loop(problem, parts, steps)
        if made is None:
            return math.nan
        return norm({name: made[name] - g.double() for name, g in expected.items()}) / (norm(expected) or 1.0)

    if failure.updates and failure.updates[0] > 1 and error(problem.steps) <= parts.tolerance:
        return "a loop that has just begun is right on this window: something is kept from windows before"
    single = error(1)
    text = f"with steps=1 the same loop is off by {single:.2g}: it computes another loss than the one given"
    if single <= parts.tolerance:
        text = f"with steps=1 the same loop is right: {OVER_A_MICRO_BATCH}"
    differing = _differing_outputs(problem, failure)
    outputs, (delivered, others) = "", ("", [])
    if differing is not None:
        outputs = "the model's outputs are right: the fault is in the loss or after it"
    if differing:
        places = places_in_words(differing)
        outputs = f"the model's outputs in micro-batch {places} are not those on the whole batch"
    else:
        delivered, others = delivered_in_words(parts, _new(problem, failure, problem.steps))
    if single <= parts.tolerance and (delivered or differing):
        text = "with steps=1 the same loop is right"
        if 0 not in (differing or others or [0]):
            text += ": something changes from one micro-batch to the next"
        elif not delivered:
            text += f": {OVER_A_MICRO_BATCH}"
    return "; ".join(filter(None, (outputs, delivered, "" if math.isnan(single) else text)))


def _new(problem: Problem, failure: Failure, steps: int) -> TrainingState:
    return TrainingState(replace(problem, model=copy.deepcopy(failure.model), steps=steps), DOUBLE)


def _differing_outputs(problem: Problem, failure: Failure) -> list[int] | None:
    """The micro-batches in which the model's outputs are not those on the whole batch; None if not known."""
    if world_size() > 1 or problem.perturb is not None:
        return None
    passes = _passes(problem, failure)
    if passes is None:
        return None
    whole = _floats(larger_batch_of(problem, copy.deepcopy(failure.model), failure.batch).outputs)
    samples = batch_size(failure.batch)
    differing = []
    for number, (numbers, outputs) in enumerate(passes):
        due = [each[numbers] if each.dim() and len(each) == samples else None for each in whole]
        shapes = [None if each is None else each.shape for each in due]
        if shapes != [each.shape for each in outputs]:
            return None  # outputs without samples, or of another size than on the whole batch
        pairs = zip(outputs, due, strict=True)
        if not all(bool((a - b).norm() <= SAME * b.norm()) for a, b in pairs if b is not None):
            differing.append(number)
    return differing


def _passes(problem: Problem, failure: Failure) -> list[tuple[list[int], list[Tensor]]] | None:
    """The samples and outputs of each forward pass; None where they are not the window's micro-batches."""
    state = _new(problem, failure, problem.steps)
    outputs: list[list[Tensor]] = []

    def keep(module: Any, arguments: Any, made: Any) -> None:
        if torch.is_grad_enabled():
            outputs.append([each.clone() for each in _floats(made)])

    try:
        with state.inner.register_forward_hook(keep):
            observation = observe(state, cast(failure.batch, DOUBLE))
    except Exception:
        return None
    numbers = [each for each in observation.micro_batches if each]
    if not numbers or len(numbers) != len(observation.micro_batches) or len(numbers) != len(outputs):
        return None
    return list(zip(numbers, outputs, strict=True))


def _floats(values: Any) -> list[Tensor]:
    return [each.detach() for each in tensors(values) if each.is_floating_point()]
