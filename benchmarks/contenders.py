"""A way to train, an epoch at a time: the base of all contenders, and those written by hand."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from accumexp.accum import measure_activations
from accumexp.environment.device import wait_for
from accumexp.environment.random_state import seed_everything

from .tasks import SEED, Task

TOLERANCE = 1e-9


class WrongGradient(AssertionError):
    """A contender computes another gradient than the one it is held against."""


class Contender:
    """A way to train, an epoch at a time."""

    name: ClassVar[str]
    fused: ClassVar[bool | None] = None

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model: nn.Module = task.build()
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.model.parameters(), 0.01, momentum=0.9, fused=self.fused
        )

    def seconds(self) -> float:
        """Trains for an epoch and returns the seconds that took, the device's included."""
        wait_for(self.task.device)
        start = perf_counter()
        self.epoch()
        wait_for(self.task.device)
        return perf_counter() - start

    @property
    def logged(self) -> int:
        """Updates so far that did more than the others: metrics, a read of the device, points."""
        return 0

    def flush(self, own_seconds: float) -> float:
        """Seconds of what is due after `own_seconds` of training since it was last done."""
        return 0.0

    def epoch(self) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


class HandWritten(Contender):
    name = "hand-written"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.tensors = [tensor.to(task.device) for tensor in task.dataset().tensors]

    def epoch(self) -> None:
        steps = self.task.steps
        order = torch.randperm(self.task.samples, device=self.task.device)
        for chosen in order.split(self.task.batch):
            batch = [tensor[chosen] for tensor in self.tensors]
            self.optimizer.zero_grad()
            for *inputs, targets in zip(*(tensor.chunk(steps) for tensor in batch), strict=True):
                (cross_entropy(self.model(*inputs), targets) / steps).backward()
            self.optimizer.step()


class Fused(HandWritten):
    """The same loop with torch's fused optimizer, so that its gain is not taken for the window's."""

    name = "hand-written fused"
    fused = True


class SingleBatch(HandWritten):
    name = "single-batch"

    def __init__(self, task: Task) -> None:
        super().__init__(replace(task, micro_batch=task.batch, steps=1))


class HandWrittenLoader(Contender):
    name = "dataloader"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.loader = task.loader()

    def epoch(self) -> None:
        steps, device = self.task.steps, self.task.device
        for step, batch in enumerate(self.loader, 1):
            *inputs, targets = (tensor.to(device) for tensor in batch)
            (cross_entropy(self.model(*inputs), targets) / steps).backward()
            if step % steps == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops the warnings and advice of whoever is at work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def built(kind: type[Contender], task: Task) -> Contender:
    """A contender with the same initial weights and the same kernels as every other.

    Raises:
        ModuleNotFoundError: if the peer is not installed.
    """
    seed_everything(SEED, task.deterministic)
    with quiet():
        made = kind(task)
    for logger in ("lightning.pytorch", "lightning.fabric", "accelerate", "transformers"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    return made


def timed(contender: Contender) -> float:
    """Seconds of one epoch, with the global switches that a peer may have turned put back before it."""
    seed_everything(SEED, contender.task.deterministic)
    with quiet():
        return contender.seconds()


def first_gradient(kind: type[Contender], task: Task) -> list[Tensor]:
    """The gradient of the first update of `task`, in float64: rounding is then no excuse for a difference."""
    contender = built(kind, replace(task, samples=task.batch, dtype=torch.float64))
    timed(contender)
    # What momentum starts from, so that it does not matter when a loop zeroes `.grad`.
    state = contender.optimizer.state
    gradient = [state[p]["momentum_buffer"].cpu().clone() for p in contender.model.parameters()]
    contender.close()
    return gradient


def saved_bytes(contender: Contender) -> int:
    """Peak bytes saved for backward in an epoch's updates, without parameters and inputs."""
    fed: list[Any] = []  # alive to the end, or an activation could get a batch's address
    with measure_activations(contender.model, []) as saved:

        def exclude(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            fed.append(inputs)
            saved.exclude(inputs)

        handle = contender.model.register_forward_pre_hook(exclude)
        timed(contender)
        handle.remove()
    return saved.peak_bytes


def relative_error(name: str, gradient: list[Tensor], reference: list[Tensor]) -> float:
    """The largest of the parameters' errors, each relative to its gradient's norm.

    A gradient that is nothing beside the whole one (below a thousandth of its norm) is held against that
    thousandth: of attention's key biases it is zero but for rounding.

    Raises:
        WrongGradient: if it is above the tolerance.
    """
    least = 1e-3 * float(torch.stack([wanted.norm() for wanted in reference]).norm())
    pairs = zip(gradient, reference, strict=True)
    error = max(float((found - wanted).norm()) / max(float(wanted.norm()), least) for found, wanted in pairs)
    if not error <= TOLERANCE:
        raise WrongGradient(f"{name}: the gradient is off by {error:.1e} of its norm")
    return error
