"""What makes one sample's result depend on the others in its batch: modules and losses, by experiment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..accum.batch import Nested, map_tensors, tensors
from .fixed_draws import fixed_draws
from .float64 import computing
from .gradients import DOUBLE
from .larger_batch import call, mean_loss
from .problem import Batch, Problem, cast
from .rounding import in_precision, narrowed

# In fp64 a sample's result moves by less than this where only the other samples change.
NOTHING = 1e-8


@dataclass(frozen=True)
class Coupling:
    """A module whose output on half a batch differs by `effect` from that half of its output on all of it."""

    name: str
    kind: str
    effect: float


def coupling_modules(problem: Problem, batch: Batch) -> list[Coupling]:
    """The smallest modules that couple samples: those of which no part does."""
    model = narrowed(problem.model, DOUBLE)
    inputs, _ = cast(batch, DOUBLE)
    found: dict[str, Coupling] = {}
    names = {module: name for name, module in model.named_modules()}
    # What a parametrization is given are weights, whatever their first dimension is.
    names = {module: name for module, name in names.items() if "parametrizations" not in name.split(".")}
    before: dict[nn.Module, dict[str, Tensor]] = {}
    samples = tensors(inputs)[0].shape[0]
    half = samples // 2
    trying = [False]

    def entered(module: nn.Module, arguments: Any, keywords: Any) -> None:
        if not trying[0]:
            before[module] = _buffers(module)

    def tried(module: nn.Module, arguments: Any, keywords: Any, outputs: Any) -> None:
        name = names[module]
        inner = any(other.startswith(f"{name}." if name else "") for other in found)
        if trying[0] or inner or not _by_sample([arguments, keywords, outputs], samples):
            return
        trying[0] = True
        after = _buffers(module)
        try:
            # The whole once more, from where the module began: what is not the same then is so for reasons
            # of its own (a count in Python, a generator outside torch), and need not couple samples.
            _put(module, before[module])
            with draws.modules.again(name or "(model)", samples):
                same = module(*_first(arguments, samples), **_first(keywords, samples))
            if not _apart(same, outputs, samples) <= NOTHING:
                return
            _put(module, before[module])
            with draws.modules.again(name or "(model)", half):
                part = module(*_first(arguments, half), **_first(keywords, half))
            effect = _apart(part, outputs, half)
        except Exception:
            return  # a module that cannot take half a batch is judged by the one around it
        finally:
            trying[0] = False
            _put(module, after)
        if effect > NOTHING:
            found[name] = Coupling(name or "(model)", type(module).__name__, effect)

    handles = [module.register_forward_pre_hook(entered, with_kwargs=True) for module in names]
    handles += [module.register_forward_hook(tried, with_kwargs=True) for module in names]
    try:
        with (
            torch.no_grad(),
            computing(DOUBLE),
            fixed_draws(model, cast(batch, DOUBLE), problem.seed, dims=problem.dims) as draws,
        ):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def _put(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in module.named_buffers():
        if name in buffers and buffer.shape == buffers[name].shape:
            buffer.copy_(buffers[name])


def _apart(part: Any, outputs: Any, rows: int) -> float:
    """How far the first `rows` of `outputs` are from those of `part`, relative; 0 of integers alone."""
    pairs = zip(_floats(part), _floats(outputs), strict=True)
    apart = (float((p - w[:rows]).norm() / w[:rows].norm().clamp_min(1e-300)) for p, w in pairs)
    return max(apart, default=0.0)


def loss_couples(problem: Problem, batch: Batch) -> float:
    """How much the gradient at one half's outputs moves when the other half's outputs change, relative.

    0 for every weighted mean of the samples' own losses.
    """
    batch = cast(batch, DOUBLE)
    outputs = in_precision(problem, narrowed(problem.model, DOUBLE), batch, DOUBLE).outputs
    given = [t for t in tensors(outputs) if t.is_floating_point()]
    if not given or given[0].dim() == 0:
        return 0.0
    half = given[0].shape[0] // 2
    generator = torch.Generator(given[0].device).manual_seed(problem.seed)

    def changed(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.dim():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
        moved = tensor.detach().clone()
        moved[half:] += noise[half:] * tensor.detach().std().clamp_min(1e-3)
        return moved

    with problem.loss_in(DOUBLE) as loss, computing(DOUBLE):
        one = _gradient_of(loss, outputs, batch[1])
        other = _gradient_of(loss, map_tensors(changed, outputs), batch[1])
    top = sum(float((b[:half] - a[:half]).square().sum()) for a, b in zip(one, other, strict=True))
    below = sum(float(a[:half].square().sum()) for a in one)
    return (top / below) ** 0.5 if below else 0.0


def _gradient_of(loss: Callable[..., Any], outputs: Nested, targets: Any) -> list[Tensor]:
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1]

    value = mean_loss(loss, map_tensors(leaf, outputs), targets)
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def _by_sample(values: Any, samples: int) -> bool:
    """Whether every tensor in `values` has the samples as its first dimension, and there is one."""
    found = _all(values)
    return bool(found) and all(t.dim() > 0 and t.shape[0] == samples for t in found)


def _all(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        return [t for value in values.values() for t in _all(value)]
    return [t for value in values for t in _all(value)] if isinstance(values, tuple | list) else []


def _floats(values: Any) -> list[Tensor]:
    return [t.detach() for t in _all(values) if t.is_floating_point()]


def _first(values: Any, rows: int) -> Any:
    """`values` with the first `rows` of every tensor, copied: a module may write into what it is given."""
    if isinstance(values, Tensor):
        return values[:rows].clone()
    if isinstance(values, dict):
        return {key: _first(value, rows) for key, value in values.items()}
    if isinstance(values, tuple | list):
        return type(values)(_first(value, rows) for value in values)
    return values
