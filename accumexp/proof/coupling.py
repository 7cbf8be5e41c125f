"""Experiments that find modules and losses in which a sample's result depends on the others in its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..accum.memory import measure_activations
from .fixed_draws import fixed_draws
from .float64 import DOUBLE, keep_float64
from .larger_batch import call, mean_loss
from .nested import batch_size, cloned, map_tensors, tensors, tensors_by_path
from .problem import Problem, WholeBatch, cast, copy_in, rows
from .rounding import larger_batch_of

# Relative change in fp64 below which a result does not depend on the other samples.
NEGLIGIBLE = 1e-8


@dataclass(frozen=True)
class Coupling:
    """A module that couples samples. `effect` is the relative change of its output on half a batch alone."""

    name: str
    kind: str
    effect: float


def coupling_modules(problem: Problem, batch: WholeBatch) -> list[Coupling]:
    """The smallest modules that couple samples: those without a submodule that does."""
    model = copy_in(problem.model, DOUBLE)
    inputs = cloned(cast(batch, DOUBLE)[0])
    couplings: dict[str, Coupling] = {}
    # The inputs of a parametrization are weights, not samples.
    names = {
        module: name for name, module in model.named_modules() if "parametrizations" not in name.split(".")
    }
    buffers_before: dict[nn.Module, dict[str, Tensor]] = {}
    received: dict[nn.Module, tuple[Any, Any]] = {}
    samples = batch_size(inputs)
    half = samples // 2
    in_experiment = False

    def before_forward(module: nn.Module, arguments: Any, keywords: Any) -> None:
        if not in_experiment:
            buffers_before[module] = _buffers(module)
            # Copies, because a module may write into its inputs.
            received[module] = cloned(arguments), cloned(keywords)

    def repeated(module: nn.Module, arguments: Any, keywords: Any, count: int) -> Any:
        """Calls `module` as before, on the first `count` samples."""
        _restore(module, buffers_before[module])
        with draws.modules.repeated(names[module] or "(model)", count):
            return module(*_first(arguments, count), **_first(keywords, count))

    def after_forward(module: nn.Module, _: Any, __: Any, outputs: Any) -> None:
        nonlocal in_experiment
        if in_experiment:
            return
        arguments, keywords = received.pop(module)
        name = names[module]
        inner = any(other.startswith(f"{name}." if name else "") for other in couplings)
        by_sample = [t.dim() > 0 and len(t) == samples for t in tensors([arguments, keywords, outputs])]
        if inner or not by_sample or not all(by_sample):
            return
        in_experiment = True
        buffers_after = _buffers(module)
        try:
            # If the whole batch gives another result too, the reason is a counter or a generator in Python.
            whole = repeated(module, arguments, keywords, samples)
            if not _difference(whole, outputs, samples) <= NEGLIGIBLE:
                return
            effect = _difference(repeated(module, arguments, keywords, half), outputs, half)
        except Exception:
            return  # a module that cannot take half a batch is judged by the one around it
        finally:
            in_experiment = False
            _restore(module, buffers_after)
        if effect > NEGLIGIBLE:
            couplings[name] = Coupling(name or "(model)", type(module).__name__, effect)

    # `model` is a copy, so its hooks stay.
    for module in names:
        module.register_forward_pre_hook(before_forward, with_kwargs=True)
        module.register_forward_hook(after_forward, with_kwargs=True)
    fixed = fixed_draws(model, cast(batch, DOUBLE), problem.seed, sample_dims=problem.sample_dims)
    # With gradients, which a model may take in its forward pass.
    with keep_float64(DOUBLE), fixed as draws:
        call(model, inputs)
    return list(couplings.values())


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


def _restore(module: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in module.named_buffers():
        if name in buffers and buffer.shape == buffers[name].shape:
            with torch.no_grad():
                buffer.copy_(buffers[name])


def _difference(part: Any, outputs: Any, rows: int) -> float:
    """The relative difference of `part` from the first `rows` of `outputs`; 0 for integers alone."""
    pairs = zip(_floats(part), _floats(outputs), strict=True)
    return max(
        (float((p - w[:rows]).norm() / w[:rows].norm().clamp_min(1e-300)) for p, w in pairs), default=0.0
    )


def loss_couples(problem: Problem, batch: WholeBatch, by_targets: bool = False) -> float:
    """The relative change of the gradient at one half's outputs when the other half's outputs change.

    Args:
        by_targets: change the other half's floating point targets instead.

    0 for every weighted mean of the samples' own losses. Outputs without a dimension of samples stay as they
    are, see `whole_batch_outputs`.
    """
    batch = cast(batch, DOUBLE)
    outputs = larger_batch_of(problem, copy_in(problem.model, DOUBLE), batch).outputs
    samples = batch_size(batch)
    half = samples // 2
    by_sample = [t.dim() > 0 and len(t) == samples for t in _floats(outputs)]
    device = next(problem.model.parameters()).device
    generator = torch.Generator(device).manual_seed(problem.seed)

    def changed(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.dim() or len(tensor) != samples:
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
        moved = tensor.detach().clone()
        moved[half:] += noise[half:] * tensor.detach().std().clamp_min(1e-3)
        return moved

    original = _gradient_at(problem, outputs, batch)
    if by_targets:
        moved = _gradient_at(problem, outputs, (batch[0], map_tensors(changed, batch[1])))
    else:
        moved = _gradient_at(problem, map_tensors(changed, outputs), batch)
    if original is None or moved is None:
        return 0.0
    pairs = [(a[:half], b[:half]) for a, b, rows in zip(original, moved, by_sample, strict=True) if rows]
    change = sum(float((b - a).square().sum()) for a, b in pairs)
    size = sum(float(a.square().sum()) for a, _ in pairs)
    return (change / size) ** 0.5 if size else 0.0


def loss_adds(
    problem: Problem, batch: WholeBatch, parts: Sequence[Sequence[int]], weights: Sequence[float]
) -> bool:
    """Whether the loss's gradients at the outputs of `parts` of the batch are those on all of it.

    Args:
        weights: of the parts in the loss.
    """
    batch = cast(batch, DOUBLE)
    outputs = larger_batch_of(problem, copy_in(problem.model, DOUBLE), batch).outputs
    samples, total = batch_size(batch), sum(weights)
    whole = _gradient_at(problem, outputs, batch)
    if whole is None or not all(each.dim() and len(each) == samples for each in whole) or not total:
        return False
    size = sum(float(each.square().sum()) for each in whole)
    off = 0.0
    for numbers, weight in zip(parts, weights, strict=True):
        index = torch.tensor(numbers, device=problem.device)
        part = map_tensors(lambda t, index=index: t[index] if t.dim() else t, outputs)
        gradients = _gradient_at(problem, part, rows(batch, index))
        if gradients is None:
            return False
        pairs = zip(gradients, whole, strict=True)
        off += sum(float((a * weight / total - b[index]).square().sum()) for a, b in pairs)
    return off <= NEGLIGIBLE**2 * size


def whole_batch_outputs(problem: Problem, batch: WholeBatch) -> list[str]:
    """The outputs that the loss depends on and that have no dimension of samples, such as "[1]".

    A model that returns a number for the whole batch (a balance of experts, a regulariser of activations)
    couples its samples.
    """
    batch = cast(batch, DOUBLE)
    samples = batch_size(batch)
    half = samples // 2
    model = copy_in(problem.model, DOUBLE)

    def outputs_on(part: slice) -> Any:
        return larger_batch_of(problem, model, rows(batch, part)).outputs

    outputs = outputs_on(slice(None))
    gradients = _gradient_at(problem, outputs, batch)
    if gradients is None:
        return []
    suspects = {
        path: leaf
        for (path, leaf), gradient in zip(_floats_by_path(outputs), gradients, strict=True)
        if (not leaf.dim() or len(leaf) != samples) and bool(gradient.count_nonzero())
    }
    if not suspects or not half:
        return list(suspects)
    # A model that returns its loss adds over the samples: the mean of the halves', or their sum.
    first, second = (dict(_floats_by_path(outputs_on(part))) for part in (slice(0, half), slice(half, None)))
    share = half / samples

    def adds(path: str, whole: Tensor) -> bool:
        one, other = first.get(path, whole), second.get(path, whole)
        if one.shape != whole.shape or other.shape != whole.shape:
            return False
        sums = (share * one + (1 - share) * other, one + other)
        return any(bool((each - whole).norm() <= NEGLIGIBLE * whole.norm()) for each in sums)

    return [path for path, leaf in suspects.items() if not adds(path, leaf)]


def loss_bytes(problem: Problem, batch: WholeBatch) -> int:
    """The bytes that a loss which couples samples saves for backward on all outputs of `batch`; 0 for others.

    It couples them if it declares so, or by their outputs.

    A loop may cache the outputs of its micro-batches and compute such a loss on all of them.
    """
    if not problem.couples and not loss_couples(problem, batch) > NEGLIGIBLE:
        return 0
    batch = cast(batch, DOUBLE)
    model = copy_in(problem.model, DOUBLE)
    outputs = larger_batch_of(problem, model, batch).outputs
    with measure_activations(model, tensors(batch)) as saved:
        _gradient_at(problem, outputs, batch)
    return saved.peak_bytes


def _gradient_at(problem: Problem, outputs: Any, batch: WholeBatch) -> list[Tensor] | None:
    """The gradient of the mean loss with respect to every floating point tensor in `outputs`.

    None for a loss that needs the model's graph, such as a penalty on gradients by the model's inputs.
    """
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1]

    inputs, targets = batch
    model = copy_in(problem.model, DOUBLE)
    fixed = fixed_draws(model, batch, problem.seed, sample_dims=problem.sample_dims)
    with problem.loss_in(DOUBLE) as loss, keep_float64(DOUBLE), fixed as draws:
        draws.modules.start_pass(inputs)
        # A copy of each leaf, which a loss may write into.
        copies = map_tensors(lambda tensor: leaf(tensor).clone(), outputs)
        try:
            value = mean_loss(loss, copies, cloned(targets))
        except RuntimeError:
            return None
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]


def _floats(values: Any) -> list[Tensor]:
    return [t.detach() for t in tensors(values) if t.is_floating_point()]


def _floats_by_path(values: Any) -> list[tuple[str, Tensor]]:
    return [(path, t.detach()) for path, t in tensors_by_path(values) if t.is_floating_point()]


def _first(values: Any, rows: int) -> Any:
    """`values` with copies, which a module may write into, of the first `rows` of every tensor."""
    return cloned(map_tensors(lambda tensor: tensor[:rows], values))
