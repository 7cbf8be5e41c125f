"""A model that runs out of memory where a test wants it to, and what a window has then left behind."""

from __future__ import annotations

import random
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from accumexp.training.callbacks import Callback
from accumexp.training.trainer import Trainer

SAMPLES, STEPS = 64, 8

WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Short(nn.Module):
    """Passes on what it is given, but for the forward passes numbered in `at`, from 0: they fail, `where`."""

    def __init__(self, at: Collection[int] = (), where: str = "forward", error: Any = None) -> None:
        super().__init__()
        self.at = set(at)
        self.where = where
        self.error = torch.OutOfMemoryError(WORDS) if error is None else error
        self.calls = 0
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, values: Tensor) -> Tensor:
        random.random()  # Python's own draws go back too
        call, self.calls = self.calls, self.calls + 1
        fails = call in self.at
        if fails:
            made = values * 2
            self.seen += [weakref.ref(values), weakref.ref(made)]
            if self.where == "forward":
                raise self.error
            return _Fails.apply(values, self.error)
        return values


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, error: BaseException) -> Tensor:
        ctx.error = error
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise ctx.error


class Starved(Callback):
    """Fails in a micro-batch of update `at`, from 1, on `rank` or on all; `times` of them, one a try."""

    def __init__(self, at: int, micro_batch: int = 0, rank: int | None = None, times: int = 1) -> None:
        self.at, self.micro_batch, self.rank, self.times = at, micro_batch, rank, times
        self._calls = self._failed = 0

    def run_begin(self, trainer: Trainer) -> None:
        trainer.model.register_forward_hook(lambda *_: self._forward(trainer))
        trainer.window.on_discard.append(self._again)

    def _again(self) -> None:
        self._calls = 0

    def _forward(self, trainer: Trainer) -> None:
        concerned = self.rank in (None, trainer.window.sync.ranks.rank)
        if not concerned or trainer.progress.update + 1 != self.at or self._failed >= self.times:
            return
        call, self._calls = self._calls, self._calls + 1
        if call == self.micro_batch:
            self._failed += 1
            raise torch.OutOfMemoryError(WORDS)


def stateful(short: Short, classes: int = 5) -> nn.Module:
    """Draws, running statistics, and a failure between two layers with gradients."""
    torch.manual_seed(3)
    layers = [nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Dropout(0.3), short, nn.Linear(9, classes)]
    return nn.Sequential(*layers).double()


def stateless(short: Short, classes: int = 5) -> nn.Module:
    """What a split changes nothing of."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), short, nn.Linear(9, classes)).double()


def left_behind(model: nn.Module) -> dict[str, Any]:
    """Gradients, buffers and random state, whose every bit a window decides."""
    state: dict[str, Any] = {f"grad {n}": p.grad for n, p in model.named_parameters()}
    state.update({f"buffer {n}": b.clone() for n, b in model.named_buffers()})
    return {**state, "torch": torch.get_rng_state(), "python": random.getstate()}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what is not the same to the bit."""
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not _same(value, other[name])]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and one == other
