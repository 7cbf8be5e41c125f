"""Checks of single windows: ragged and weighted batches, buffers, activations, ranks, resuming, overflow."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..accum.memory import measure_activations
from .certificate import Check, excess
from .coupling import loss_bytes
from .float64 import DOUBLE
from .larger_batch import relative_error, whole_batch_pass
from .micro_batches import rows_are_others, share_of
from .nested import tensors
from .observation import Observation, observe
from .problem import Problem, TrainingState, WholeBatch, cast, copy_in, rows
from .ranks import all_gather, world_size, worst
from .replay import SHARDED, tensors_of
from .rounding import U64, ExpectedUpdate, prepared_pass

STATISTICS = "fp64 rounding of statistics over the samples: 8 times 2^-29 of what fp32 loses, and 8 n u"
ONE_GRAPH = "a window keeps one micro-batch's graph; a second one alive would make it twice as much"
LOADED = "state saved between two windows and loaded again: not a bit may differ"
ONE_GRADIENT = "one gradient is reduced for all ranks: not a bit may differ between them"
REDUCED = "the numbers that reducing collectives carry, over the parameters': each reduction adds 1"


def buffers_check(problem: Problem, state: TrainingState, expected: ExpectedUpdate) -> Check | None:
    """Compares the buffers after the loop's window with those after the larger batch."""
    errors = buffer_errors(problem, state, expected)
    if not errors:
        return None
    bounds = expected.buffer_bounds
    name = max(errors, key=lambda key: excess(errors[key], bounds[key]))
    figure = worst(all_gather(errors[name]))
    at = f"worst at {name}" if figure else "no difference"
    return Check("buffers", figure, bounds[name], "relative", STATISTICS, at)


def buffer_errors(problem: Problem, state: TrainingState, expected: ExpectedUpdate) -> dict[str, float]:
    """The relative error of each buffer that the loop does not change by hand."""
    buffers = state.buffers()
    larger = expected.larger.buffers
    return {n: relative_error(buffers[n], larger[n]) for n in larger if n not in problem.hand_changed}


def activations_check(problem: Problem, batch: WholeBatch) -> Check | None:
    """Compares what a window saves for backward with one micro-batch's share of the larger batch's."""
    batch = cast(batch, DOUBLE)
    state = TrainingState(problem, DOUBLE)
    observe(state, batch)  # a loop may itself measure activations in its first window
    try:
        observation = observe(state, batch, measure=True)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        detail = "not measured: torch.func's gradients do not show what they keep for backward"
        return Check("saved activations", math.nan, math.nan, "ratio", ONE_GRAPH, detail, decided=False)
    if not any(observation.sizes) or not observation.saved_bytes:
        return None
    model = copy_in(problem.model, DOUBLE)
    larger = _saved_bytes(problem, model, batch)
    if not larger:
        return None  # a linear model needs its inputs alone
    largest = share_of(problem) if rows_are_others(observation, batch) else max(observation.sizes)
    # What a sample needs may depend on its length.
    largest_ones = [numbers for numbers in observation.micro_batches if numbers and len(numbers) == largest]
    numbered = [torch.tensor(numbers, device=problem.device) for numbers in largest_ones]
    needs = []
    for indices in numbered or [slice(0, largest)]:
        micro_batch = rows(batch, indices)
        # The loop's copy of its targets counts as an activation.
        copied = sum(t.numel() * t.element_size() for t in tensors(micro_batch[1]))
        needs.append(_saved_bytes(problem, model, micro_batch) + copied)
    share = max(all_gather(max(needs) / larger))
    figure = max(all_gather(observation.saved_bytes / larger))
    if figure > 1.5 * share:
        share += max(all_gather(loss_bytes(problem, batch) / larger))
    whose = "the larger batch's"
    if figure > 1.5 * share and world_size() == 1:
        # More for every sample is kept in another layout than the larger batch's, say.
        kept = _kept_in_one(problem, batch)
        if observation.saved_bytes <= 1.5 * share * kept:
            whose, larger, figure = "the loop's own with steps=1,", kept, observation.saved_bytes / kept
    of = f"of {whose} {larger / 2**20:.2f} MiB in fp64; a micro-batch and its targets: {share:.3g}"
    return Check("saved activations", figure, 1.5 * share, "ratio", ONE_GRAPH, of, about="memory")


def _saved_bytes(problem: Problem, model: nn.Module, batch: WholeBatch) -> int:
    with prepared_pass(problem, model, batch) as (model, loss, batch):
        with measure_activations(model, tensors(batch)) as saved:
            whole_batch_pass(model, loss, batch, on_copies=saved.exclude)
    return saved.peak_bytes


def _kept_in_one(problem: Problem, batch: WholeBatch) -> int:
    """What the loop itself saves for backward with `steps=1`; 0 if it fails."""
    state = TrainingState(replace(problem, steps=1), DOUBLE)
    try:
        return observe(state, batch, measure=True).saved_bytes
    except Exception:
        return 0


def resume_check(problem: Problem, batches: list[WholeBatch]) -> Check:
    """Compares a window after a stop, from saved state, with the same window without the stop."""
    first, second = (cast(batch, DOUBLE) for batch in batches)
    undisturbed, resumed = TrainingState(problem, DOUBLE), TrainingState(problem, DOUBLE)
    observe(undisturbed, first)
    checkpoint = copy.deepcopy({name: part.state_dict() for name, part in undisturbed.parts().items()})
    outside = {name: value.clone() for name, value in undisturbed.outside.items()}
    observe(undisturbed, second)
    for name, part in resumed.parts().items():
        part.load_state_dict(checkpoint[name])
    resumed.outside.update({name: value.clone() for name, value in outside.items()})
    observe(resumed, second)
    errors = state_errors(resumed.inner, undisturbed.inner, resumed.optimizer, undisturbed.optimizer)
    figure, name = max(all_gather(max(errors)))
    bound = SHARDED * U64 if world_size() > 1 else 0.0
    at = f"worst at {name}" if figure else "no difference after a window"
    return Check("resume", figure, bound, "relative", LOADED, at)


def state_errors(
    model: nn.Module, expected_model: nn.Module, optimizer: Any, expected_optimizer: Any
) -> list[tuple[float, str]]:
    """The relative error and name of each entry in the states of model and optimizer. A collective call."""
    actual, expected = model.state_dict(), expected_model.state_dict()
    errors = [(_error(actual[name], value), name) for name, value in expected.items()]
    actual, expected = tensors_of(optimizer), tensors_of(expected_optimizer)
    if actual.keys() != expected.keys():
        return [*errors, (math.inf, "optimizer")]
    return errors + [(_error(actual[key], value), f"optimizer {key}") for key, value in expected.items()]


def _error(actual: Any, expected: Any) -> float:
    if isinstance(expected, Tensor):
        return relative_error(actual, expected)
    return 0.0 if actual == expected else math.inf


def agreement_check(observation: Observation) -> Check | None:
    """Checks that all ranks gave their optimizers the same gradient."""
    if world_size() == 1:
        return None
    figure = math.inf
    if all(all_gather(observation.gradient is not None)):
        assert observation.gradient is not None
        flat = torch.cat([g.double().flatten() for g in observation.gradient.values()])
        low, high = flat.clone(), flat.clone()
        dist.all_reduce(low, dist.ReduceOp.MIN)
        dist.all_reduce(high, dist.ReduceOp.MAX)
        figure = worst(all_gather(float((high - low).norm()) / (float(flat.norm()) or 1.0)))
    detail = "gradients differ between ranks" if figure else "no difference"
    return Check("ranks agree", figure, 0.0, "relative", ONE_GRADIENT, detail)


class Reductions(TorchDispatchMode):
    """While active, counts the numbers that reducing collectives carry."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reduces = any(kind in func.__name__ for kind in ("allreduce", "all_reduce", "reduce_scatter"))
        if reduces and func.namespace in ("c10d", "_c10d_functional"):
            # A reduce-scatter sends the larger one of its two buffers.
            buffers = [[x.numel() for x in tree_leaves(arg) if isinstance(x, Tensor)] for arg in args]
            self.numbers += max(map(sum, buffers))
        return func(*args, **(kwargs or {}))


def collectives_check(problem: Problem, batch: WholeBatch, most: int = 1) -> Check | None:
    """Checks that the gradient is reduced at most `most` times in a window."""
    if world_size() == 1:
        return None
    batch = cast(batch, DOUBLE)
    state = TrainingState(problem, DOUBLE)
    observe(state, batch)  # wrappers set up their buffers in the first window
    with Reductions() as reductions:
        observe(state, batch)
    numbers = sum(p.numel() for p in problem.model.parameters() if p.requires_grad)
    figure = max(all_gather(reductions.numbers / numbers))
    detail = f"{problem.steps} micro-batches on each of {world_size()} ranks"
    name = "gradient reductions a window"
    return Check(name, figure, most + 0.5, "count", REDUCED, detail, about="communication")
