"""Training loops that are timed: their base class, and those written by hand."""

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
    """A loop computes another gradient than the reference."""


class Loop:
    """A training loop that is run an epoch at a time."""

    name: ClassVar[str]
    fused: ClassVar[bool | None] = None

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model: nn.Module = task.build()
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            self.model.parameters(), 0.01, momentum=0.9, fused=self.fused
        )

    def seconds(self) -> float:
        """Trains for an epoch; its seconds, until the device has finished."""
        wait_for(self.task.device)
        start = perf_counter()
        self.epoch()
        wait_for(self.task.device)
        return perf_counter() - start

    @property
    def logged(self) -> int:
        """The number of updates so far that computed metrics, read the device and wrote points."""
        return 0

    def flush(self, training_seconds: float) -> float:
        """Writes what waits, if it is due `training_seconds` after the last flush; the seconds that takes."""
        return 0.0

    def epoch(self) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


class HandWritten(Loop):
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
    """The same loop with torch's fused optimizer, to separate its gain from the window's."""

    name = "hand-written fused"
    fused = True


class SingleBatch(HandWritten):
    name = "single-batch"

    def __init__(self, task: Task) -> None:
        super().__init__(replace(task, micro_batch=task.batch, steps=1))


class HandWrittenLoader(Loop):
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
    """Ignores warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def built(kind: type[Loop], task: Task) -> Loop:
    """A loop, with the same initial weights and kernels for all kinds.

    Raises:
        ModuleNotFoundError: if the peer is not installed.
    """
    seed_everything(SEED, task.deterministic)
    with quiet():
        made = kind(task)
    for logger in ("lightning.pytorch", "lightning.fabric", "accelerate", "transformers"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    return made


def timed(loop: Loop) -> float:
    """Seconds of one epoch; before it, global switches that a peer may have changed are set again."""
    seed_everything(SEED, loop.task.deterministic)
    with quiet():
        return loop.seconds()


def first_gradient(kind: type[Loop], task: Task) -> list[Tensor]:
    """The gradient of the first update of `task`, in float64, where rounding cannot explain a difference."""
    loop = built(kind, replace(task, samples=task.batch, dtype=torch.float64))
    timed(loop)
    # Momentum starts as the gradient; loops zero `.grad` at different times.
    state = loop.optimizer.state
    gradient = [state[p]["momentum_buffer"].cpu().clone() for p in loop.model.parameters()]
    loop.close()
    return gradient


def saved_bytes(loop: Loop) -> int:
    """Peak bytes saved for backward in an epoch, without parameters and inputs."""
    fed: list[Any] = []  # kept, or an activation could get the address of a freed batch
    with measure_activations(loop.model, []) as saved:

        def exclude(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            fed.append(inputs)
            saved.exclude(inputs)

        handle = loop.model.register_forward_pre_hook(exclude)
        timed(loop)
        handle.remove()
    return saved.peak_bytes


def relative_error(name: str, gradient: list[Tensor], reference: list[Tensor]) -> float:
    """The largest of the parameters' errors, each relative to its gradient's norm.

    The norm is taken as at least a thousandth of the whole gradient's: the gradient of attention's key
    biases, for example, is zero up to rounding.

    Raises:
        WrongGradient: if it is above the tolerance.
    """
    least = 1e-3 * float(torch.stack([wanted.norm() for wanted in reference]).norm())
    pairs = zip(gradient, reference, strict=True)
    error = max(
        float((computed - wanted).norm()) / max(float(wanted.norm()), least) for computed, wanted in pairs
    )
    if not error <= TOLERANCE:
        raise WrongGradient(f"{name}: the gradient is off by {error:.1e} of its norm")
    return error
