"""Validation of the arguments of `certify`, before anything is computed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..accum.batch import batch_size, tensors
from .problem import WholeBatch


def batches_of(argument: Any) -> list[WholeBatch]:
    """The batches of `argument`: one pair (inputs, targets), or a tuple or list of such pairs.

    Two pairs of tensors are two batches. A batch whose inputs and targets are both pairs must be in a list,
    `[(inputs, targets)]`.

    Raises:
        ValueError: for anything else, or if tensors of a batch differ in their first dimension.
    """
    single = _is_pair(argument) and (
        isinstance(argument[1], Tensor | Mapping) or not all(map(_is_pair, argument))
    )
    pairs: list[Any] = [argument] if single else list(argument) if isinstance(argument, tuple | list) else []
    if not pairs or not all(map(_is_pair, pairs)):
        wrong = _description(argument)
        raise ValueError(f"batch: one (inputs, targets) or a list of such pairs, samples first, not {wrong}")
    for pair in pairs:
        batch_size(pair)
    return [(inputs, targets) for inputs, targets in pairs]


def _is_pair(value: Any) -> bool:
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    try:
        return all(tensors(part) for part in value)
    except ValueError:
        return False


def _description(value: Any) -> str:
    kind = type(value).__name__
    if not isinstance(value, tuple | list):
        return f"a {kind}"
    if not value:
        return f"an empty {kind}"
    return f"a {kind} of {', '.join(type(item).__name__ for item in value[:4])}"


def check_model(model: nn.Module) -> None:
    """Raises a ValueError if `model` has no gradient to compare."""
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError("model: it has no parameters, so there is no gradient to be compared")
    for name, tensor in [*parameters.items(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(
                f"model: {name} has no shape yet; call the model once on a batch before the proof"
            )
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError("model: none of its parameters requires a gradient; unfreeze those that are trained")


def check_schedule(
    model: nn.Module,
    optimizer: Callable[[list[nn.Parameter]], Optimizer],
    scheduler: Callable[[Optimizer], Any] | None,
) -> None:
    """Raises a ValueError if the schedule's `step()` cannot be called without arguments."""
    if scheduler is None:
        return
    schedule = scheduler(optimizer(list(copy.deepcopy(model).parameters())))
    kind = type(schedule).__name__
    step = getattr(schedule, "step", None)
    if step is None:
        raise ValueError(f"scheduler: {kind} has no step()")
    needed = [
        name
        for name, parameter in inspect.signature(step).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise ValueError(
            f"scheduler: {kind}.step() needs {', '.join(needed)}; the rate has to follow from the number of "
            "updates alone: leave the schedule out for the proof, or take one whose step() needs nothing"
        )
