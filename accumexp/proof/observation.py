"""What a loop does in one window, recorded by hooks on its model, parameters and optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..accum.memory import SavedActivations, measure_activations
from .compilation import outside_graphs
from .fixed_draws import seeded_draws
from .float64 import keep_float64
from .forward_passes import ForwardPass, ForwardPasses
from .larger_batch import Gradient, dense
from .nested import tensors
from .problem import TrainingState, WholeBatch, unsharded
from .sample_ids import SampleIds


@dataclass
class Observation:
    """One window of a loop.

    Attributes:
        gradient: what `.grad` held at the optimizer's first step, by parameter name; None without a step.
        received: those among them that are sparse or complex, which `gradient` has as dense real tensors.
        absent: parameters without a gradient then; `gradient` has zeros for them.
        unscaled_by_optimizer: whether the optimizer divides the gradient by the loss scale itself, as fused
            ones can; `gradient` is divided.
        steps: number of optimizer steps.
        passes_before_step: forward passes before each of these steps.
        outside: the values of the tensors in `Problem.state` when the window begins.
        initial: what `.grad` holds when the window begins, by parameter name; empty for zeros.
        moved_before: forward passes before which parameters are not what they were in the pass before.
        changed_buffers: names of buffers that change between two forward passes, by the second's number.
        changed_outside: names of the tensors in `Problem.state` that do, in the same way.
        moved: names of those that change first.
        moved_by: by what all parameters are multiplied before the first of them; None if not all alike.
        rates: learning rate of every parameter group in the first step.
        micro_batches: sample numbers of each forward pass; None for one with rows that are not in the batch.
        sizes: number of samples in each forward pass.
        random_states: hash of torch's generator states before each forward pass that draws.
        training: names of the modules in train mode in each forward pass.
        arrived: sum in fp64 of the gradients that autograd delivered, before rounding into `.grad`.
        arrived_norms: sums of their 2-norms.
        arrivals: how often gradients arrived at a parameter, at most.
        loss: what the loop returned, as a number, or None.
        saved_bytes: peak of what autograd saved for backward.
    """

    gradient: Gradient | None = None
    received: Gradient = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    unscaled_by_optimizer: bool = False
    steps: int = 0
    passes_before_step: list[int] = field(default_factory=list)
    outside: dict[str, Tensor] = field(default_factory=dict)
    outside_changes: dict[str, int] = field(default_factory=dict)
    initial: Gradient = field(default_factory=dict)
    moved_before: list[int] = field(default_factory=list)
    changed_buffers: dict[int, list[str]] = field(default_factory=dict)
    changed_outside: dict[int, list[str]] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)
    moved_by: float | None = None
    rates: list[float] = field(default_factory=list)
    micro_batches: list[list[int] | None] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    random_states: list[bytes] = field(default_factory=list)
    training: list[set[str]] = field(default_factory=list)
    arrived: Gradient = field(default_factory=dict)
    arrived_norms: dict[str, float] = field(default_factory=dict)
    arrivals: int = 0
    loss: float | None = None
    saved_bytes: int = 0


def observe(
    state: TrainingState, batch: WholeBatch, *, measure: bool = False, arrivals: bool = False
) -> Observation:
    """Calls the loop for its update on `batch`; records `saved_bytes` if `measure`, and arrivals if asked."""
    with ExitStack() as stack:
        stack.enter_context(state.problem.loss_in(state.dtype))
        outside = {name: value.clone() for name, value in state.outside.items()}
        stack.enter_context(state.problem.outside_as(state.outside))
        versions = state.problem.outside_versions()
        saved = None
        if measure:
            saved = stack.enter_context(measure_activations(state.inner, tensors(batch)))
        observation = stack.enter_context(observing(state, batch, arrivals, saved))
        observation.outside = outside
        returned = state.train(batch)
        after = state.problem.outside_versions()
        observation.outside_changes = {name: after[name] - version for name, version in versions.items()}
    if saved is not None:
        observation.saved_bytes = saved.peak_bytes
    if isinstance(returned, Tensor):
        observation.loss = float(unsharded(returned.detach())) if returned.numel() == 1 else None
    elif isinstance(returned, float | int) and not isinstance(returned, bool):
        observation.loss = float(returned)
    return observation


@contextmanager
def observing(
    state: TrainingState, batch: WholeBatch, arrivals: bool = False, saved: SavedActivations | None = None
) -> Iterator[Observation]:
    """Records what happens to the model, the parameters and the optimizer of `state`.

    Random draws are those of every window of the proof, and fp64 is kept. The model's inputs do not count
    in `saved`.
    """
    observation = Observation()
    begun_passes: list[ForwardPass] = []
    inputs_alive: list[Tensor] = []  # so that no activation reuses the memory of an input
    arrivals_by_name: Counter[str] = Counter()

    sizes_before: dict[str, float] = {}
    buffers: dict[str, float] = {}  # after the last forward pass

    versions: dict[str, int] = {}  # of tensors outside the model, before the last forward pass

    def after_forward(*_: Any) -> None:
        if torch.is_grad_enabled():
            buffers.update(_sizes(state.buffers()))

    def before_pass(begun: ForwardPass, inputs: list[Tensor]) -> None:
        sizes = _sizes(state.parameters())
        if sizes_before and sizes != sizes_before:
            if not observation.moved_before:
                observation.moved = [name for name, size in sizes.items() if size != sizes_before[name]]
                observation.moved_by = _common_ratio(sizes, sizes_before)
            observation.moved_before.append(len(observation.sizes))
        sizes_before.update(sizes)
        now = _sizes(state.buffers())
        if changed := [name for name, size in now.items() if size != buffers.get(name, size)]:
            observation.changed_buffers[len(observation.sizes)] = changed
        outside = state.problem.outside_versions()
        if versions and (changed := [name for name in outside if outside[name] != versions[name]]):
            observation.changed_outside[len(observation.sizes)] = changed
        versions.update(outside)
        begun_passes.append(begun)
        observation.micro_batches.append(begun.samples)
        observation.sizes.append(begun.size)
        if saved is not None:
            inputs_alive.extend(inputs)
            saved.exclude(inputs)

    def record_gradient(optimizer: Any) -> None:
        if observation.gradient is None:
            scale = getattr(optimizer, "grad_scale", None)
            observation.gradient = _gradient(state, scale)
            observation.received = _received(state, scale)
            observation.unscaled_by_optimizer = scale is not None
            observation.absent = {name for name, p in state.parameters().items() if p.grad is None}
            observation.rates = [float(group["lr"]) for group in optimizer.param_groups]
        observation.passes_before_step.append(len(observation.sizes))

    def before_step(optimizer: Any, arguments: Any, keywords: Any) -> Any:
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return None  # a fused optimizer skips this step by itself
        observation.steps += 1
        # The hook's first argument is the optimizer itself, before the loop's arguments.
        itself, *rest = arguments
        closure = rest[0] if rest else keywords.get("closure")
        if closure is None:
            record_gradient(optimizer)
            return None

        def observed() -> Any:
            value = closure()
            record_gradient(optimizer)
            return value

        if rest:
            return (itself, observed, *rest[1:]), keywords
        return arguments, {**keywords, "closure": observed}

    def record_arrival(name: str, gradient: Tensor) -> None:
        exact = dense(unsharded(gradient)).detach().double()
        total = observation.arrived.get(name)
        observation.arrived[name] = exact.clone() if total is None else total + exact
        observation.arrived_norms[name] = observation.arrived_norms.get(name, 0.0) + float(exact.norm())
        arrivals_by_name[name] += 1
        observation.arrivals = max(observation.arrivals, arrivals_by_name[name])

    for name, parameter in state.parameters().items():
        if parameter.grad is not None and bool(dense(unsharded(parameter.grad)).any()):
            observation.initial[name] = dense(unsharded(parameter.grad)).detach().clone()
    with ExitStack() as stack:
        passes = ForwardPasses(state.inner, SampleIds(batch[0], None, batch[1]), before_pass)
        stack.enter_context(passes.hooks)
        stack.enter_context(state.inner.register_forward_hook(outside_graphs(after_forward)))
        stack.enter_context(_last_step_hook(state.optimizer, before_step))
        for name, parameter in state.parameters().items() if arrivals else ():
            if parameter.requires_grad:
                stack.enter_context(parameter.register_hook(partial(record_arrival, name)))
        stack.enter_context(keep_float64(state.dtype, state.problem.narrowing))
        stack.enter_context(seeded_draws(state.problem, state.inner, batch))
        yield observation
    # Without those that turned out to be no micro-batches, after which buffers may be restored.
    kept = {id(each): number for number, each in enumerate(passes.passes)}
    numbers = [kept.get(id(each)) for each in begun_passes]
    observation.changed_buffers = {
        number: names
        for begun, names in observation.changed_buffers.items()
        if (number := numbers[begun]) is not None and (not begun or numbers[begun - 1] is not None)
    }
    observation.micro_batches = [each.samples for each in passes.passes]
    observation.sizes = [each.size for each in passes.passes]
    observation.random_states = [each.random_state for each in passes.passes if each.draws]
    observation.training = [each.training for each in passes.passes]


@contextmanager
def _last_step_hook(optimizer: Optimizer, hook: Callable[..., Any]) -> Iterator[None]:
    """Calls `hook` before a step of `optimizer`, after the loop's own hooks, which may change gradients."""
    handle = optimizer.register_step_pre_hook(hook)

    def move_to_the_end(stepped: Optimizer, *_: Any) -> None:
        if stepped is optimizer:
            hooks = optimizer._optimizer_step_pre_hooks
            hooks[handle.id] = hooks.pop(handle.id)

    # Hooks of all optimizers are called before those of one.
    with handle, register_optimizer_step_pre_hook(move_to_the_end):
        yield


def _sizes(tensors_by_name: Mapping[str, Tensor]) -> dict[str, float]:
    """The 1-norms of the floating point tensors, which tell whether they have changed."""
    local = {
        name: getattr(tensor, "_local_tensor", tensor).detach()
        for name, tensor in tensors_by_name.items()
        if tensor.is_floating_point() or tensor.is_complex()
    }
    if not local:
        return {}
    norms = torch._foreach_norm(list(local.values()), 1)  # pyright: ignore[reportPrivateImportUsage]
    return dict(zip(local, torch.stack([norm.double() for norm in norms]).tolist(), strict=True))


def _common_ratio(sizes: dict[str, float], before: dict[str, float]) -> float | None:
    ratios = [size / before[name] for name, size in sizes.items() if before[name] and size != before[name]]
    alike = len(ratios) > 1 and max(ratios) - min(ratios) <= 1e-6 * abs(ratios[0])
    return ratios[0] if alike else None


def _gradient(state: TrainingState, scale: Tensor | None) -> Gradient:
    """A copy of every `.grad`, unsharded and divided by `scale`; zeros for None."""
    copies = {}
    for name, parameter in state.parameters().items():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            value = dense(unsharded(grad)).detach().clone()
            copies[name] = value if scale is None else value / scale
    return copies


def _received(state: TrainingState, scale: Tensor | None) -> Gradient:
    """A copy of the gradients that are sparse or complex, as the optimizer receives them."""
    copies = {}
    for name, parameter in state.parameters().items():
        gradient = parameter.grad
        if gradient is not None and (gradient.is_sparse or gradient.is_complex()):
            value = gradient.detach().clone()
            copies[name] = value if scale is None else value / scale
    return copies
