"""What `certify` is given, looked at before anything is computed: a clear word where it cannot be proved."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ..accum.batch import batch_size, tensors
from .problem import Batch


def batches_of(given: Any) -> list[Batch]:
    """The batches in `given`: one pair (inputs, targets), or a tuple or list of them.

    Two pairs of tensors are two batches; one batch whose inputs and targets are both pairs has to be in a
    list, `[(inputs, targets)]`.

    Raises:
        ValueError: if it is neither, or tensors of a batch differ in their first dimension.
    """
    one = _pair(given) and (isinstance(given[1], Tensor | Mapping) or not all(map(_pair, given)))
    pairs: list[Any] = [given] if one else list(given) if isinstance(given, tuple | list) else []
    if not pairs or not all(map(_pair, pairs)):
        raise ValueError(
            f"batch: one (inputs, targets) or a list of such pairs, samples first, not {_described(given)}"
        )
    for pair in pairs:
        batch_size(pair)
    return [(inputs, targets) for inputs, targets in pairs]


def _pair(given: Any) -> bool:
    if not isinstance(given, tuple | list) or len(given) != 2:
        return False
    try:
        return all(tensors(part) for part in given)
    except ValueError:
        return False


def _described(given: Any) -> str:
    kind = type(given).__name__
    if not isinstance(given, tuple | list):
        return f"a {kind}"
    return (
        f"a {kind} of {', '.join(type(one).__name__ for one in given[:4])}" if given else f"an empty {kind}"
    )


def check_model(model: nn.Module) -> None:
    """Raises a ValueError if there is no gradient of `model` to be compared."""
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
    """Raises a ValueError if a schedule's `step()` cannot be called without arguments."""
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
