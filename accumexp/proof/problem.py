"""What is to be proved: a loop, and all that says which update it is to make."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..accum.batch import Nested, batch_size, map_tensors, tensors

TrainWindow = Callable[..., Any]
Batch = tuple[Nested, Nested]


@dataclass(frozen=True)
class Scaling:
    """The settings of a loop's dynamic loss scale, which predict the scale of every update.

    A window that overflows multiplies it by `backoff_factor`, `growth_interval` windows in a row without
    an overflow by `growth_factor`. Of a static scale `backoff_factor` and `growth_factor` are 1.
    """

    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000


@dataclass(frozen=True)
class Problem:
    """A loop and the update it should make. See `certify` for the arguments.

    Attributes:
        dtype: of the parameters in the run.
        autocast: of the loop's `torch.autocast` in the run, or None.
        fixed: whether random draws are held fixed by sample (`draws`).
        ignores: whether targets that the loss ignores are tried where the batches have none.
        dims: by place in the forward pass, the dimension of a draw that has the samples; None of one that
            all samples share.
    """

    train_window: TrainWindow
    model: nn.Module
    loss: Callable[..., Any]
    batches: Sequence[Batch]
    steps: int
    optimizer: Callable[[list[nn.Parameter]], Optimizer]
    scheduler: Callable[[Optimizer], Any] | None = None
    clip_norm: float | None = None
    prepare: Callable[[nn.Module], nn.Module] | None = None
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    scaling: Scaling | None = None
    seed: int = 0
    fixed: bool = False
    ignores: bool = False
    dims: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def samples(self) -> int:
        """Samples of the first, whole batch."""
        return batch_size(self.batches[0])

    @property
    def micro_batch(self) -> int:
        """Samples of a full window's largest micro-batch, over all ranks."""
        return -(-self.samples // self.steps)

    @contextmanager
    def loss_in(self, dtype: torch.dtype) -> Iterator[Callable[..., Any]]:
        """The loss with its own numbers (class weights) in `dtype`; the loop's is the same object."""
        if not isinstance(self.loss, nn.Module):
            yield self.loss
            return
        kept = {name: value.data for name, value in _numbers(self.loss)}
        self.loss.to(dtype)
        try:
            yield self.loss
        finally:
            for name, value in _numbers(self.loss):
                value.data = kept[name]


def _numbers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """`batch` with its floating numbers in `dtype`; targets in fp32 at least."""
    inputs, targets = batch
    return _cast(inputs, dtype), _cast(targets, torch.promote_types(dtype, torch.float32))


def _cast(batch: Nested, dtype: torch.dtype) -> Nested:
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


def rows(batch: Batch, chosen: Tensor | slice) -> Batch:
    """The samples of `batch` that `chosen`, indices or a slice, names."""
    inputs, targets = batch
    return map_tensors(lambda t: t[chosen], inputs), map_tensors(lambda t: t[chosen], targets)


class Start:
    """A model with an optimizer and a schedule of its own: what a loop trains.

    A fresh copy of the problem's model in `dtype`, prepared for the loop; or `inner`, which a loop of its
    own trains with `optimizer`.
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
        self.inner = copy.deepcopy(problem.model).to(dtype) if inner is None else inner
        self.schedule: Any = None
        if optimizer is not None:
            self.model, self.optimizer = self.inner, optimizer
            return
        self.model = problem.prepare(self.inner) if problem.prepare else self.inner
        self.optimizer = problem.optimizer(list(self.model.parameters()))
        if problem.scheduler:
            self.schedule = problem.scheduler(self.optimizer)

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.inner.named_parameters())

    def train(self, batch: Batch) -> Any:
        """The loop's update on `batch`; what it returns."""
        # A loop may change its batch in place; nobody else shall see that.
        own = tuple(map_tensors(torch.clone, part) for part in batch)
        arguments: list[Any] = [self.model, self.optimizer, own, self.problem.steps]
        if self.schedule is not None:
            arguments.append(self.schedule)
        return self.problem.train_window(*arguments)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from `seed`; afterwards as if nothing had happened."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def whole(tensor: Tensor) -> Tensor:
    """`tensor` in one piece, where it is spread over ranks; all of them must ask."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


@dataclass
class Ids:
    """Which sample of the update's batch each row that a model sees is.

    A row is known by its content, so that the order in which a loop brings samples does not matter.
    """

    known: dict[bytes, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: Nested, numbers: Sequence[int] | None = None) -> Ids:
        """Of the rows of `inputs`, which are samples 0, 1, 2, ... or those of `numbers`."""
        ids = cls()
        keys = _keys(inputs) or []
        for number, key in zip(range(len(keys)) if numbers is None else numbers, keys, strict=True):
            ids.known.setdefault(key, []).append(number)
        return ids

    def alike(self) -> dict[int, int]:
        """Of every sample the first one that is equal to it."""
        return {number: same[0] for same in self.known.values() for number in same}

    def find(self, arguments: Any, taken: dict[bytes, int]) -> list[int] | None:
        """The samples that a forward's `arguments` are, or None if any is unknown.

        `taken` counts how often each row came before in this window: equal samples are told apart so.
        """
        keys = _keys(arguments)
        if keys is None or any(key not in self.known for key in keys):
            return None
        found = []
        for key in keys:
            turn = taken.get(key, 0)
            taken[key] = turn + 1
            same = self.known[key]
            found.append(same[turn % len(same)])
        return found


def _keys(batch: Any) -> list[bytes] | None:
    """One key a row, of all tensors that have rows; None where there are none."""
    try:
        found = tensors(batch)
        size = batch_size(batch)
    except ValueError:
        return None
    if not size:
        return []
    columns = [t.detach().reshape(size, -1).double().cpu() for t in found]
    widest = max(column.shape[1] for column in columns)
    # The widest alone: what is given beside them (a label, lengths) may differ in form.
    wide = [column for column in columns if column.shape[1] == widest]
    return [b"".join(sorted(column[k].numpy().tobytes() for column in wide)) for k in range(size)]
