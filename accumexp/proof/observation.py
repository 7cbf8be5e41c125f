"""What a loop does in one window, seen from outside: by hooks on its model, parameters and optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..accum.batch import batch_size, tensors
from ..accum.memory import SavedActivations, measure_activations
from .fixed_draws import drawing
from .float64 import computing
from .larger_batch import Gradient
from .problem import Batch, Ids, Start, whole


@dataclass
class Observation:
    """One window of a loop.

    Attributes:
        gradient: what the optimizer was given in its first step, or None if it took no step.
        absent: parameters that had no gradient then, which are zeros in `gradient`.
        steps: how often the optimizer stepped.
        rates: the learning rate of every parameter group in the first step.
        micro_batches: the samples of each forward pass in the update's batch; None of one whose rows were
            not recognised.
        sizes: how many samples each forward pass saw.
        random: the state of torch's generators at each forward pass, as a hash.
        divided: the optimizer was to divide the gradient itself, as a fused one can; `gradient` is divided.
        arrived: the sum of the gradients that autograd delivered, in fp64, before any was rounded into
            `.grad`; `arrived_norms` the sums of their norms.
        arrivals: how often a gradient arrived at a parameter, at most.
        loss: what the loop returned, as a number, or None.
        saved_bytes: the peak of what autograd kept for backward.
    """

    gradient: Gradient | None = None
    absent: set[str] = field(default_factory=set)
    steps: int = 0
    rates: list[float] = field(default_factory=list)
    micro_batches: list[list[int] | None] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    random: list[bytes] = field(default_factory=list)
    divided: bool = False
    arrived: Gradient = field(default_factory=dict)
    arrived_norms: dict[str, float] = field(default_factory=dict)
    arrivals: int = 0
    loss: float | None = None
    saved_bytes: int = 0


def observe(start: Start, batch: Batch, *, measure: bool = False, arrivals: bool = False) -> Observation:
    """Lets the loop make its update on `batch` and tells what it did.

    `measure` counts bytes kept for backward, `arrivals` sums what autograd delivers.
    """
    problem = start.problem
    with ExitStack() as stack:
        # A criterion's class weights are not in bf16 because the model's are.
        stack.enter_context(problem.loss_in(torch.promote_types(start.dtype, torch.float32)))
        saved = None
        if measure:
            inside = [*tensors(batch[0]), *tensors(batch[1])]
            saved = stack.enter_context(measure_activations(start.inner, inside))
        seen = stack.enter_context(watching(start, batch, arrivals, saved))
        returned = start.train(batch)
    if saved is not None:
        seen.saved_bytes = saved.peak_bytes
    seen.loss = as_number(returned)
    return seen


def as_number(returned: Any) -> float | None:
    """The loss that a loop returned, or None."""
    if isinstance(returned, Tensor):
        return float(whole(returned.detach())) if returned.numel() == 1 else None
    return float(returned) if isinstance(returned, float | int) and not isinstance(returned, bool) else None


@contextmanager
def watching(
    start: Start, batch: Batch, arrivals: bool = False, saved: SavedActivations | None = None
) -> Iterator[Observation]:
    """Inside, hooks record what happens to the model, the parameters and the optimizer of `start`.

    It draws as in every window of the proof, and fp64 stays fp64. What the model is given is no activation:
    `saved` is told to leave it out.
    """
    seen = Observation()
    alive: list[Tensor] = []  # so that no activation gets the memory of an input
    ids = Ids.of(batch[0])
    taken: dict[bytes, int] = {}

    def forward(module: Any, arguments: Any, keywords: Any) -> None:
        if not torch.is_grad_enabled():
            return
        given = [item for item in [*arguments, *keywords.values()] if _has_tensors(item)]
        try:
            seen.sizes.append(batch_size(given))
        except ValueError:
            return
        seen.micro_batches.append(ids.find(given, taken))
        seen.random.append(_random_state(start.problem.device))
        if saved is not None:
            alive.extend(tensors(given))
            saved.exclude(tensors(given))

    def used(optimizer: Any) -> None:
        if seen.gradient is None:
            scale = getattr(optimizer, "grad_scale", None)
            seen.gradient, seen.divided = gradients(start, scale), scale is not None
            seen.absent = {name for name, p in start.parameters().items() if p.grad is None}
            seen.rates = [float(group["lr"]) for group in optimizer.param_groups]

    def step(optimizer: Any, arguments: Any, keywords: Any) -> Any:
        found = getattr(optimizer, "found_inf", None)
        if found is not None and bool(found):
            return None  # a fused optimizer that is told to skip
        seen.steps += 1
        # Hooks get the optimizer itself before what the loop gave it.
        itself, *rest = arguments
        closure = rest[0] if rest else keywords.get("closure")
        if closure is None:
            used(optimizer)
            return None

        def watched() -> Any:
            value = closure()
            used(optimizer)
            return value

        if rest:
            return (itself, watched, *rest[1:]), keywords
        return arguments, {**keywords, "closure": watched}

    handles = [
        start.inner.register_forward_pre_hook(forward, with_kwargs=True),
        start.optimizer.register_step_pre_hook(step),
    ]
    counts: dict[str, int] = {}
    for name, parameter in start.parameters().items() if arrivals else ():
        if parameter.requires_grad:
            handles.append(parameter.register_hook(_adds(seen, counts, name)))
    try:
        with computing(start.dtype), drawing(start.problem, start.inner, batch):
            yield seen
    finally:
        seen.arrivals = max(counts.values(), default=0)
        for handle in handles:
            handle.remove()


def _random_state(device: torch.device) -> bytes:
    found = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=16)
    if device.type == "cuda":
        found.update(torch.cuda.get_rng_state(device).numpy().tobytes())
    return found.digest()


def gradients(start: Start, scale: Tensor | None = None) -> Gradient:
    """A copy of what is in `.grad`, whole, by parameter name; zeros where there is nothing."""
    found = {}
    for name, parameter in start.parameters().items():
        if not parameter.requires_grad:
            continue
        gradient = parameter.grad
        value = torch.zeros_like(whole(parameter)) if gradient is None else whole(gradient).detach().clone()
        found[name] = value if scale is None else value / scale
    return found


def _adds(seen: Observation, counts: dict[str, int], name: str) -> Any:
    def arrived(gradient: Tensor) -> None:
        found = whole(gradient).detach().double()
        counts[name] = counts.get(name, 0) + 1
        seen.arrived[name] = seen.arrived[name] + found if name in seen.arrived else found.clone()
        seen.arrived_norms[name] = seen.arrived_norms.get(name, 0.0) + float(found.norm())

    return arrived


def _has_tensors(item: Any) -> bool:
    try:
        return bool(tensors(item))
    except ValueError:
        return False
