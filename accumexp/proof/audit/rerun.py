"""How a second run of the same loop is changed: where its updates begin, its draws, and its rounding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..fixed_draws import FixedDraws, in_unit_interval, mixed
from ..larger_batch import Gradient
from ..module_tracker import OUTSIDE, ModuleTracker, in_backward
from ..nested import map_tensors
from ..sample_ids import SampleIds, row_count
from .records import JointUpdate, Update
from .samples import sample_keys

# A factor that is no power of two: a gradient that is multiplied by it is rounded otherwise.
RESCALE = 0.7


class Starts:
    """Finds the update of the first run whose weights an update of the second run begins from.

    Args:
        updates: of the first run.
    """

    def __init__(self, updates: list[JointUpdate]) -> None:
        self.updates = updates
        self._samples = [update.samples for update in updates]
        self._next = 0

    def find(self, samples: list[int]) -> int | None:
        """Its number, by the samples of this rank's first forward pass: the same ones, else some of them."""
        wanted = Counter(samples)
        ahead = range(self._next, len(self.updates))
        tests = (
            lambda k: self._samples[k] == wanted,
            lambda k: len(self.updates[k].ranks) > 1 and wanted <= self._samples[k],
            lambda k: bool(wanted & self._samples[k]),
        )
        for exact, test in zip((True, True, False), tests, strict=True):
            position = next((k for k in ahead if test(k)), None)
            if position is not None:
                self._next = position + 1 if exact else position
                return position
        return None


def load_start(module: nn.Module, update: Update) -> None:
    """Copies the parameters and buffers with which `update` began into `module`."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, value in update.before.items():
            if name in tensors and tensors[name].shape == value.shape:
                tensors[name].copy_(value)


def load_optimizer_state(optimizer: torch.optim.Optimizer, update: Update, names: Mapping[int, str]) -> None:
    """Gives every parameter of `optimizer` the state that it had in `update`."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (name := names.get(id(parameter))) is None:
                continue
            optimizer.state.pop(parameter, None)
            if state := update.optimizer_state.get(name):
                optimizer.state[parameter] = {key: _copy(value) for key, value in state.items()}


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """A copy of the state of every parameter, by name."""
    return {
        names[id(parameter)]: {key: _copy(value) for key, value in state.items()}
        for parameter, state in optimizer.state.items()
        if id(parameter) in names
    }


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def loss_gradient(
    model: nn.Module, loss: Callable[..., Any], arguments: Any, keywords: Any, targets: Any
) -> Gradient:
    """The gradient of `loss(model, inputs, targets)`, in fp64; leaves the model's buffers as they are."""
    inputs = keywords if not arguments else arguments[0] if len(arguments) == 1 else arguments
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.enable_grad():
        value = loss(model, inputs, targets)
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return {name: g.double() for name, g in zip(parameters, gradients, strict=True) if g is not None}


class Rounding:
    """Makes a run round otherwise: samples in another order within the batch, gradients at another scale.

    Neither changes the result but for rounding: outputs are put back into the samples' order, and what
    autograd delivers is divided by the factor that the outputs' gradients are multiplied by.
    """

    def __init__(self, reorder: bool, rescale: bool, seed: int) -> None:
        self.reorder = reorder
        self.factor = RESCALE if rescale else 1.0
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.zeros(0, dtype=torch.int64)

    def inputs(self, arguments: Any, keywords: Any) -> tuple[Any, Any]:
        size = row_count([arguments, keywords])
        self._order = torch.randperm(size, generator=self._generator)
        return self._rows((arguments, keywords), self._order) if self.reorder else (arguments, keywords)

    def outputs(self, outputs: Any) -> Any:
        if self.factor != 1.0:
            outputs = map_tensors(self._rescaled, outputs)
        return self._rows(outputs, self._order.argsort()) if self.reorder else outputs

    def _rescaled(self, tensor: Tensor) -> Tensor:
        return _Rescale.apply(tensor, self.factor) if tensor.requires_grad else tensor  # type: ignore[return-value]

    def _rows(self, value: Any, order: Tensor) -> Any:
        def rows(tensor: Tensor) -> Tensor:
            if not tensor.dim() or len(tensor) != len(order):
                return tensor
            return tensor[order.to(tensor.device)]

        return map_tensors(rows, value)


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.clone()  # a view could not be modified in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return gradient * ctx.factor, None


class ContentIds(SampleIds):
    """Numbers of samples by their content, without knowing the batch beforehand."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(0, 1))

    def find(self, arguments: Any) -> list[int] | None:
        return sample_keys(arguments) or None


class ModelDraws(FixedDraws):
    """Holds the draws of a model's forward passes fixed by sample, and leaves alone what the loop draws."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__(ModuleTracker(model, ContentIds()), seed, {})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.modules.module == OUTSIDE and not in_backward():
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def keyed(self, ids: list[int], shape: torch.Size, salt: int, device: torch.device) -> Tensor:
        """Depends on an element's index in every dimension, not on their sizes, which padding changes."""
        bits = mixed(torch.tensor(ids, dtype=torch.int64, device=device) + salt)
        for size in shape[1:]:
            bits = mixed(bits.unsqueeze(-1) + torch.arange(size, dtype=torch.int64, device=device))
        return in_unit_interval(bits).reshape(shape)
