"""Whether the runs of several seeds can be trained as one: found out before any of them begins."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..accum import Window
from ..accum.batch import Nested, batch_size, map_tensors
from ..config.schema import Config
from ..data import Placement, ResidentBatches, Share, Splits, build_splits
from ..data.replica_batches import gathered
from ..environment.device import tf32
from ..environment.random_state import random_state, restore_random_state, same_state, seed_everything
from ..errors import UsageError
from .replica_trainer import ReplicaTrainer

# Samples of each replica that are tried: two micro-batches with statistics of their own.
SAMPLES = 16


def shared_splits(config: Config, place: Placement, key: str) -> Splits:
    """The data of all replicas, built once.

    Args:
        key: what asks for replicas, for the error.

    Raises:
        UsageError: if another seed would have other data, or it is not on the training device.
    """
    seed_everything(config.seed, config.trainer.deterministic)
    before = random_state()
    splits = build_splits(config.data, config.seed, place, Share(steps=cast(int, config.accum.steps)))
    if not same_state(before, random_state()):
        raise UsageError(
            f"{key}: the data draws from the run's seed, and must be the same for all; seed it by itself"
        )
    if not isinstance(splits.train, ResidentBatches):
        raise UsageError(
            f"{key}: this data is streamed, once for each run; give data.resident=true if it fits on the "
            "device (and no data.augment that works sample by sample)"
        )
    return splits


def check_replicable(replicas: ReplicaTrainer, key: str) -> None:
    """Tries a window of a few samples, with each replica alone and with all together, and undoes it.

    Raises:
        UsageError: if a model draws random numbers in training, cannot be run by `torch.func.vmap`, or gets
            other gradients or buffers than alone.
    """
    joint = replicas.window
    buffers = [(buffer, buffer.clone()) for buffer in joint.buffers]
    modes = [trainer.model.training for trainer in replicas.trainers]
    state = random_state()
    inputs, targets = _few(replicas)
    try:
        alone = []
        for r, trainer in enumerate(replicas.trainers):
            trainer.model.train()
            own = [map_tensors(lambda t, r=r: t[r], batch) for batch in (inputs, targets)]
            trainer.model.zero_grad()
            trainer.window.backward(*own, steps=1)
            if not same_state(state, random_state()):
                raise UsageError(
                    f"{key}: {_drawing(trainer.window, *own)} draws random numbers in training, which would "
                    "not be those of the run alone"
                )
            alone.append(_found(trainer.window))
        _put_back(buffers)
        try:
            joint.backward(inputs, targets, steps=1)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = (lines or [type(error).__name__])[0][:300]
            raise UsageError(
                f"{key}: torch.func.vmap cannot run this model and loss for many seeds at once: {reason}"
            ) from error
        for trainer, expected in zip(replicas.trainers, alone, strict=True):
            _compare(trainer.window, expected, key)
    finally:
        _put_back(buffers)
        restore_random_state(state)
        for trainer, mode in zip(replicas.trainers, modes, strict=True):
            trainer.model.train(mode)
            trainer.model.zero_grad()


def _few(replicas: ReplicaTrainer) -> tuple[Nested, Nested]:
    """The first samples of every replica's first batch, (R, n, ...)."""
    feeds = replicas.feeds(replicas.trainers)
    planned = [next(iter(feed.epoch(0))) for feed in feeds]
    inputs, targets, each = gathered(planned, feeds, 0)
    count = min(SAMPLES, batch_size(each[0].inputs))
    few = [map_tensors(lambda t: t[:, :count], batch) for batch in (inputs, targets)]
    return few[0], few[1]


def _found(window: Window) -> dict[str, Tensor | None]:
    """Gradients and buffers by name, copied."""
    model = window.model
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return {**grads, **{name: buffer.clone() for name, buffer in model.named_buffers()}}


def _compare(window: Window, expected: dict[str, Tensor | None], key: str) -> None:
    """Holds what a model got among all against what it got alone, up to rounding."""
    device = next(window.model.parameters()).device
    found = _found(window)
    names = {name for name, _ in window.model.named_parameters()}
    whole = sum(_size(value) ** 2 for name, value in expected.items() if name in names) ** 0.5
    for name, value in expected.items():
        other = found[name]
        if value is None or other is None:
            wrong = value is not other
        elif not value.is_floating_point():
            wrong = not torch.equal(value, other)
        else:
            coarse = torch.finfo(window.autocast or value.dtype).eps
            if tf32(device) and value.dtype == torch.float32:
                coarse = max(coarse, 2.0**-10)
            # What is 0 but for rounding has no size of its own to be compared with.
            scale = _size(value) + 0.01 * (whole if name in names else 1.0)
            difference = _size(value.double() - other.double())
            wrong = bool(value.isfinite().all()) and not difference <= coarse**0.5 * scale
        if wrong:
            what = "the gradient of" if name in names else "the buffer"
            raise UsageError(
                f"{key}: {what} {name} is not that of the run alone; what the model keeps outside of its "
                "parameters and buffers is shared by all, or a buffer is replaced and not changed in place"
            )


def _size(value: Tensor | None) -> float:
    return 0.0 if value is None or not value.isfinite().all() else float(value.double().norm())


@torch.no_grad()
def _put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, before in buffers:
        buffer.copy_(before)


def _drawing(window: Window, inputs: Nested, targets: Nested) -> str:
    """The innermost module that draws."""
    found: list[str] = []
    before: dict[nn.Module, Any] = {}
    handles = []
    for name, module in window.model.named_modules():

        def enter(module: nn.Module, arguments: Any) -> None:
            before[module] = random_state()

        def leave(module: nn.Module, arguments: Any, outputs: Any, name: str = name) -> None:
            if not same_state(before[module], random_state()):
                found.append(f"{name or 'the model'} ({type(module).__name__})")

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        window.backward(inputs, targets, steps=1)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss"
