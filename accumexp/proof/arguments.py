"""Validation of the arguments of `certify`, before anything is computed."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from .nested import batch_size, map_tensors, samples_first, tensors
from .problem import WholeBatch
from .sample_ids import SampleIds

# The largest change that tells equal samples apart, relative to the distance from the mean or to the value.
NOISE = 0.01


def batches_of(argument: Any) -> list[WholeBatch]:
    """The batches of `argument`: one pair (inputs, targets), or a tuple or list of such pairs.

    Two pairs of tensors are two batches. A batch whose inputs and targets are both pairs must be in a list,
    `[(inputs, targets)]`. Beside tensors with the samples first, a batch may hold anything, see `nested.py`;
    targets may be None.

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
        try:
            batch_size(pair)
        except ValueError as error:
            advice = "stack or pad them, because a list with an entry for each sample is no batch"
            raise ValueError(f"batch: {error}; {advice}") from None
    return [(inputs, targets) for inputs, targets in pairs]


def _is_pair(value: Any) -> bool:
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    inputs, targets = value
    return bool(tensors(inputs)) and (targets is None or bool(tensors(targets)))


def told_apart(batches: Sequence[WholeBatch]) -> tuple[list[WholeBatch], list[str]]:
    """(the batches with a little noise on samples of equal inputs, a note for each batch that has such).

    A loop may take one equal sample for another without a trace, so nothing would be proved of it. Floating
    point inputs of the later ones move by at most 1 %: towards their mean over the batch, or towards 0 where
    all samples are the same.

    Raises:
        ValueError: for inputs of integers alone if less than half of the samples are distinct.
    """
    changed, notes = [], []
    for number, (inputs, targets) in enumerate(batches):
        noisy = any(tensor.is_floating_point() for tensor in samples_first(inputs))
        first = SampleIds(inputs if noisy else [inputs, targets]).first_equal()
        equal = [sample for sample, other in first.items() if sample != other]
        which = f"samples {first[equal[0]]} and {equal[0]}" if equal else ""
        which += f" and {len(equal) - 1} more" if len(equal) > 1 else ""
        if equal and noisy:
            inputs = map_tensors(partial(_with_noise, samples=equal), inputs)
            notes.append(f"{which} of batch {number} were equal: 1 % noise was added to tell them apart")
        elif 2 * len(equal) > len(first):
            raise ValueError(
                f"batch: {which} of {len(first)} are equal, so micro-batches cannot be told apart: "
                "give a batch of samples that differ"
            )
        elif equal:
            notes.append(f"{which} of batch {number} are equal: the loop may take one for the other")
        changed.append((inputs, targets))
    return changed, notes


def _with_noise(tensor: Tensor, samples: list[int]) -> Tensor:
    if not tensor.dim() or not tensor.is_floating_point():
        return tensor
    wide = tensor.detach().double()
    rows = wide[samples]
    towards_mean = wide.mean(0) - rows
    # The mean of equal numbers is rounded.
    constant = (wide == wide[0]).all(0)
    direction = torch.where(constant, -rows, towards_mean)
    if not direction.any():
        direction = torch.ones_like(rows)
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(rows.shape, generator=generator, dtype=torch.float64).to(tensor.device)
    noisy = tensor.detach().clone()
    noisy[samples] = (rows + NOISE * (0.5 + 0.5 * share) * direction).to(tensor.dtype)
    return noisy


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
    if needed := _needed(step):
        raise ValueError(
            f"scheduler: {kind}.step() needs {', '.join(needed)}; the rate has to follow from the number of "
            "updates alone: leave the schedule out for the proof, or take one whose step() needs nothing"
        )


def check_optimizer(model: nn.Module, optimizer: Callable[[list[nn.Parameter]], Optimizer]) -> None:
    """Raises a ValueError if the optimizer's `step()` cannot be called without arguments."""
    made = optimizer(list(copy.deepcopy(model).parameters()))
    if needed := _needed(made.step):
        raise ValueError(
            f"optimizer: {type(made).__name__}.step() needs {', '.join(needed)}; the update has to follow "
            "from the window's gradient alone: certify the loop with another optimizer, such as SGD"
        )


def _needed(function: Callable[..., Any]) -> list[str]:
    """The arguments that `function` cannot be called without."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
