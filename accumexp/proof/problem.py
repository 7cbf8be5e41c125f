"""The problem that a proof decides: a loop and the update it should make."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .float64 import Narrowing
from .loss_terms import couples
from .nested import batch_size, cloned, map_tensors, tensors

TrainWindow = Callable[..., Any]
# Attributes of every module: its registries, and what torch itself keeps.
MODULE_STATE = frozenset(vars(nn.Module()))
# (inputs, targets) of all samples of an update, see `nested.py`.
WholeBatch = tuple[Any, Any]
# The parameters from which on a model is large.
LARGE = 2_000_000


@dataclass(frozen=True)
class Scaling:
    """The settings of a loop's dynamic loss scale, from which the scale of every update follows.

    A window that overflows multiplies the scale by `backoff_factor`; `growth_interval` windows in a row
    without an overflow multiply it by `growth_factor`. Both factors are 1 for a static scale.
    """

    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000


@dataclass(frozen=True)
class Problem:
    """A loop and the update it should make. See `certify` for the arguments.

    Attributes:
        dtype: of the parameters in the run.
        fixed_draws: whether random draws are a function of the sample, see `fixed_draws.py`.
        sample_dims: by position in the forward pass, the dimension of a draw that indexes samples; None for
            a draw that all samples share.
        narrowing: whether fp64 is narrowed in a window, once that is known.
        drawing: the modules that draw, as a cause names them; "" if none does.
        try_ignored_targets: check windows with ignored targets although no batch has any.
        clip_value: the largest absolute value of the gradient's elements, after `clip_norm`, or None.
        transform_gradient, perturb, state, drop_last: see `certify`.
        hand_changed: frozen parameters and buffers that the loop itself changes.
        compiled: whether the loop's model is compiled in the run's own precision. The larger batch never is.
        terms: the names of the loss's terms, once they are known; empty for a loss of one term.
    """

    train_window: TrainWindow
    model: nn.Module
    loss: Callable[..., Any]
    batches: Sequence[WholeBatch]
    steps: int
    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    scheduler: Callable[[Optimizer], Any] | None = None
    clip_norm: float | None = None
    prepare: Callable[[nn.Module], nn.Module] | None = None
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    scaling: Scaling | None = None
    seed: int = 0
    fixed_draws: bool = False
    sample_dims: Mapping[str, int | None] = field(default_factory=dict)
    drawing: str = ""
    narrowing: Narrowing = field(default_factory=Narrowing)
    try_ignored_targets: bool = False
    clip_value: float | None = None
    transform_gradient: Callable[[nn.Module], Any] | None = None
    perturb: Callable[[nn.Module], Any] | None = None
    state: Mapping[str, nn.Module | Tensor] = field(default_factory=dict)
    hand_changed: frozenset[str] = frozenset()
    drop_last: bool = False
    compiled: bool = False
    terms: tuple[str, ...] = ()

    @property
    def couples(self) -> bool:
        """Whether the loss declares that it couples samples: it is one value of the whole batch's outputs."""
        return couples(self.loss)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def samples(self) -> int:
        """Samples of the first batch, which is a whole one."""
        return batch_size(self.batches[0])

    @property
    def precision_name(self) -> str:
        """The run's precision as checks name it, such as "bf16", "loss-scaled fp16" or "compiled fp32"."""
        names = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        name = names[self.autocast or self.dtype]
        if self.scaling is not None:
            name = f"loss-scaled {name}"
        # With its draws held fixed a compiled model runs eagerly, see `compilation.py`.
        return f"compiled {name}" if self.compiled and not self.fixed_draws else name

    @contextmanager
    def loss_in(self, dtype: torch.dtype) -> Iterator[Callable[..., Any]]:
        """Casts the loss's tensors (class weights) to `dtype`, at least fp32, and restores them afterwards.

        The loop's criterion may be the same object.
        """
        if not isinstance(self.loss, nn.Module):
            yield self.loss
            return
        original = {name: (value.data, value.grad) for name, value in _tensors_of(self.loss)}
        wide = torch.promote_types(dtype, torch.float32)
        for _, value in _tensors_of(self.loss):  # copies: the loss may change its buffers in place
            value.grad = None  # of a parameter: a gradient has its parameter's dtype
            value.data = value.data.to(wide if value.is_floating_point() else value.dtype, copy=True)
        try:
            yield self.loss
        finally:
            for name, value in _tensors_of(self.loss):
                value.grad = None
                value.data, value.grad = original[name]

    def outside(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Copies of the tensors in `state`, floating point ones in `dtype`."""
        return {
            name: value.detach().to(dtype if value.is_floating_point() else value.dtype, copy=True)
            for name, value in self._live().items()
        }

    @contextmanager
    def outside_as(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Gives the tensors in `state` these `values`, and takes over what they are afterwards."""
        live = self._live()
        original = {name: tensor.data for name, tensor in live.items()}
        for name, tensor in live.items():
            tensor.data = values[name]
        try:
            yield
        finally:
            for name, tensor in live.items():
                values[name] = tensor.data
                tensor.data = original[name]

    def outside_versions(self) -> dict[str, int]:
        """How often each of the tensors in `state` was changed in place so far."""
        return {name: tensor._version for name, tensor in self._live().items()}

    def _live(self) -> dict[str, Tensor]:
        live = {}
        for name, item in self.state.items():
            if isinstance(item, Tensor):
                live[name] = item
            else:
                live.update({f"{name}.{key}": tensor for key, tensor in _tensors_of(item)})
        return live


def _tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def cast(batch: WholeBatch, dtype: torch.dtype) -> WholeBatch:
    """`batch` with its floating point tensors in `dtype`; targets in fp32 at least.

    Tensors of shape () stay: they are counts of items, which a narrow dtype would round.
    """
    inputs, targets = batch
    wide = torch.promote_types(dtype, torch.float32)
    return (
        map_tensors(lambda t: _in(t, dtype) if t.dim() else t, inputs),
        map_tensors(lambda t: _in(t, wide) if t.dim() else t, targets),
    )


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype` if it has floating point elements; complex ones become pairs of at least fp32."""
    if tensor.is_complex():
        return tensor.to(torch.promote_types(dtype, torch.float32).to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def rows(batch: WholeBatch, indices: Tensor | slice) -> WholeBatch:
    """The samples of `batch` at `indices`; tensors of shape () and what is no tensor stay as they are."""
    inputs, targets = batch
    return (
        map_tensors(lambda t: t[indices] if t.dim() else t, inputs),
        map_tensors(lambda t: t[indices] if t.dim() else t, targets),
    )


class TrainingState:
    """The model, optimizer and schedule that a loop trains.

    By default a fresh copy of the problem's model in `dtype`, prepared for the loop; or `inner` with
    `optimizer`, which a trainer has built and steps.

    Attributes:
        inner: the module whose parameter names the proof uses.
        model: `inner` as the loop receives it, after `Problem.prepare`.
        outside: the values of the tensors in `Problem.state`.
    """

    def __init__(
        self,
        problem: Problem,
        dtype: torch.dtype,
        inner: nn.Module | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        self.problem = problem
        self.dtype = dtype
        self.schedule: Any = None
        self.outside = problem.outside(dtype)
        if inner is not None and optimizer is not None:
            self.inner = self.model = inner
            self.optimizer = optimizer
            return
        self.inner = copy_in(problem.model, dtype)
        self.model = problem.prepare(self.inner) if problem.prepare else self.inner
        self.optimizer = problem.optimizer(list(self.model.parameters()))
        if problem.scheduler:
            self.schedule = problem.scheduler(self.optimizer)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.inner.named_parameters())

    def buffers(self) -> dict[str, Tensor]:
        return dict(self.inner.named_buffers())

    def parts(self) -> dict[str, Any]:
        """Model, optimizer and schedule by name, those that there are."""
        parts = {"model": self.inner, "optimizer": self.optimizer, "schedule": self.schedule}
        return {name: part for name, part in parts.items() if part is not None}

    def train(self, batch: WholeBatch) -> Any:
        """Calls the loop for its update on `batch`; returns what it returns."""
        # Cloned, because a loop may change its batch in place.
        arguments: list[Any] = [self.model, self.optimizer, cloned(batch), self.problem.steps]
        if self.schedule is not None:
            arguments.append(self.schedule)
        return self.problem.train_window(*arguments)

    def model_in(self, dtype: torch.dtype) -> nn.Module:
        """A copy of the problem's model in `dtype` with the loop's weights. A collective call."""
        model = copy_in(self.problem.model, dtype)
        parameters = self.parameters()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(unsharded(parameters[name]))
        return model


def copy_in(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` in `dtype`, with the tensors that its modules keep as plain attributes."""
    # As `Module.to`, which would drop the imaginary part of complex parameters.
    copied = copy_of(model)._apply(lambda tensor: _in(tensor, dtype))
    wide = torch.promote_types(dtype, torch.float32)
    for module in copied.modules():
        for name, value in _attributes(module).items():
            if any(_constant_in(tensor, wide) is not tensor for tensor in tensors(value)):
                setattr(module, name, map_tensors(lambda t: _constant_in(t, wide), value))
    return copied


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy of `model`; tensors that a forward pass has left in its attributes lose their graph."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in tensors(list(_attributes(module).values())):
            if tensor.grad_fn is not None:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, memo)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What `module` keeps beside parameters, buffers and submodules."""
    return {name: value for name, value in vars(module).items() if name not in MODULE_STATE}


def _constant_in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A plain attribute in `dtype`, as the parameters that it is computed with are; others as they are."""
    changes = dtype is torch.float64 or tensor.dtype is torch.float64
    plain = not isinstance(tensor, nn.Parameter) and tensor.dim()
    return _in(tensor, dtype) if changes and plain else tensor


def unsharded(tensor: Tensor) -> Tensor:
    """`tensor`, gathered from all ranks if it is sharded. A collective call."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


def forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """Restores the state of torch's generators on the CPU and `device` afterwards."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def is_large(model: nn.Module) -> bool:
    """Whether `model` has so many parameters that fewer updates are compared, and smaller windows."""
    return sum(p.numel() for p in model.parameters()) > LARGE
