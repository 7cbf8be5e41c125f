"""Causes in how a loop uses its model: modes that change within a window, parameters without a gradient."""

from __future__ import annotations

from torch import nn

from .certificate import Cause, first_names
from .counts import Decomposition
from .coupling import loss_adds
from .evidence import Failure
from .problem import Problem
from .ranks import all_gather, world_size
from .rounding import norms_of_errors


def modes_cause(problem: Problem, failure: Failure) -> Cause | None:
    """The cause if modules are in another mode (train or eval) in some micro-batches than in others."""
    right = {name for name, module in problem.model.named_modules() if module.training}
    by_rank = all_gather(failure.observation.training)
    mixed = [
        rank for rank, modes in enumerate(by_rank) if 0 < sum(each != right for each in modes) < len(modes)
    ]
    if not mixed:
        return None
    rank, modes = mixed[0], by_rank[mixed[0]]
    differing = {number: each ^ right for number, each in enumerate(modes) if each != right}
    names = sorted(set().union(*differing.values()))
    smallest = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    kinds = [f"{name} ({type(problem.model.get_submodule(name)).__name__})" for name in smallest]
    where = "the model is" if "" in names else f"{first_names(kinds)} {'is' if len(kinds) == 1 else 'are'}"
    first, changed = next(iter(differing.items()))
    mode = "train" if changed & modes[first] else "eval"
    places = ", ".join(map(str, differing)) + (f" of rank {rank}" if world_size() > 1 else "")
    reason = f"{where} in {mode} mode in micro-batch {places}, not in the others"
    return failure.cause("modes", reason, "", "keep every module's mode for all of the window")


def without_gradient_cause(failure: Failure) -> Cause | None:
    """The cause if all that differs are parameters that have no gradient in the larger batch."""
    expected, observed = failure.expected.gradient, failure.observation.gradient
    if observed is None or failure.precision or world_size() > 1:
        return None
    errors, bounds = norms_of_errors(observed, expected), failure.expected.bounds
    names = [name for name in expected if not errors[name] <= bounds[name]]
    if not names or any(bool(expected[name].any()) for name in names):
        return None
    reason = f"the larger batch gives {first_names(names)} no gradient, and the loop does"
    advice = (
        "call the model in the loop as on the whole batch: a part under no_grad, or a checkpoint with "
        "use_reentrant=True whose inputs need no gradients, gives none"
    )
    return failure.cause("without a gradient", reason, "", advice)


def backward_cause(problem: Problem, failure: Failure, parts: Decomposition) -> Cause | None:
    """The cause if samples are coupled by the model's backward pass alone: outputs and loss are right."""
    every = [numbers for each in parts.micro_batches for numbers in each]
    if not loss_adds(problem, failure.batch, every, parts.weights):
        return None
    exact, bounds = failure.expected.larger.gradient, failure.expected.bounds
    names = [
        name
        for name, g in exact.items()
        if not float((sum(part[name] for part in parts.parts) - g.double()).norm()) <= bounds[name]
    ]
    if not names:
        return None
    counting = [
        f"{name} ({type(module).__name__})"
        for name, module in problem.model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq
    ]
    why = f": scale_grad_by_freq=True in {first_names(counting)}" if counting else ""
    reason = (
        f"the model's backward pass couples samples: the gradient of {first_names(names)} on the batch is "
        f"not the sum of its micro-batches', and outputs and loss are right{why}"
    )
    shown = "the loss's gradients at the outputs of each micro-batch are those on the whole batch"
    advice = "leave what a module makes of its gradient to transform_gradient=, once for the window"
    return failure.cause("coupling backward", reason, shown, advice)
