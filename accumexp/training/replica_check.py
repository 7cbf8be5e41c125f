"""Checks, before they begin, that the runs of several seeds can be trained as one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..accum import Window
from ..accum.batch import Nested, batch_size, map_tensors
from ..accum.terms import has_terms
from ..config.schema import Config
from ..data import Placement, ResidentBatches, Share, Splits, build_splits
from ..data.replica_batches import gathered
from ..environment.device import tf32
from ..environment.random_state import random_state, restore_random_state, same_state, seed_everything
from ..errors import UsageError, first_line
from .components import ignored_label
from .replica_trainer import ReplicaTrainer

# Samples of each replica in the trial window.
SAMPLES = 16


def shared_splits(config: Config, place: Placement, key: str) -> Splits:
    """The data of all replicas, built once.

    Args:
        key: the setting that requests replicas, for the error.

    Raises:
        UsageError: if the data depends on the seed, or is not on the training device.
    """
    seed_everything(config.seed, config.trainer.deterministic)
    before = random_state()
    splits = build_splits(
        config.data, config.seed, place, Share(steps=cast(int, config.accum.steps)), ignored_label(config)
    )
    if not same_state(before, random_state()):
        raise UsageError(
            f"{key}: the data draws from the run's seed, and must be the same for all; seed it by itself"
        )
    if config.data.sampler:
        raise UsageError(f"{key}: data.sampler orders the samples of one run, leave it out")
    if not isinstance(splits.train, ResidentBatches):
        raise UsageError(
            f"{key}: this data is streamed, once for each run; give data.resident=true if it fits on the "
            "device (and no data.augment that works sample by sample)"
        )
    return splits


def check_replicable(replicas: ReplicaTrainer, key: str) -> None:
    """Compares a window of a few samples, of each replica alone and of all together; restores all state.

    Raises:
        UsageError: if a model draws random numbers in training, cannot be run by `torch.func.vmap`, or has
            other gradients or buffers than alone.
    """
    window = replicas.window
    buffers = [(buffer, buffer.clone()) for buffer in window.buffers.values()]
    modes = [trainer.model.training for trainer in replicas.trainers]
    state = random_state()
    inputs, targets = _first_samples(replicas)
    try:
        expected = []
        for r, trainer in enumerate(replicas.trainers):
            trainer.model.train()
            batch = [map_tensors(lambda t, r=r: t[r], part) for part in (inputs, targets)]
            trainer.model.zero_grad()
            trainer.window.backward(*batch, steps=1)
            if not same_state(state, random_state()):
                raise UsageError(
                    f"{key}: {_drawing_module(trainer.window, *batch)} draws random numbers in training, "
                    "which would not be those of the run alone"
                )
            if has_terms(trainer.window.loss):
                raise UsageError(
                    f"{key}: the loss has several terms or couples samples, which many runs in one loop do "
                    "not accumulate; give the seeds to a sweep, -m seed=0,1,2"
                )
            expected.append(_gradients_and_buffers(trainer.window))
        _restore(buffers)
        try:
            window.backward(inputs, targets, steps=1)
        except Exception as error:
            reason = first_line(error)
            raise UsageError(
                f"{key}: torch.func.vmap cannot run this model and loss for many seeds at once: {reason}"
            ) from error
        for trainer, values in zip(replicas.trainers, expected, strict=True):
            _compare(trainer.window, values, key)
    finally:
        _restore(buffers)
        restore_random_state(state)
        for trainer, mode in zip(replicas.trainers, modes, strict=True):
            trainer.model.train(mode)
            trainer.model.zero_grad()


def _first_samples(replicas: ReplicaTrainer) -> tuple[Nested, Nested]:
    """The first samples of every replica's first batch, (R, n, ...)."""
    feeds = replicas.feeds(replicas.trainers)
    planned = [next(iter(feed.epoch(0))) for feed in feeds]
    inputs, targets, each = gathered(planned, feeds, 0)
    count = min(SAMPLES, batch_size(each[0].inputs))
    few = [map_tensors(lambda t: t[:, :count], batch) for batch in (inputs, targets)]
    return few[0], few[1]


def _gradients_and_buffers(window: Window) -> dict[str, Tensor | None]:
    """Gradients and buffers by name, copied."""
    model = window.model
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return {**grads, **{name: buffer.clone() for name, buffer in model.named_buffers()}}


def _compare(window: Window, expected: dict[str, Tensor | None], key: str) -> None:
    """Compares the results of a stacked model with `expected`, those of the model alone, up to rounding."""
    device = next(window.model.parameters()).device
    together = _gradients_and_buffers(window)
    names = {name for name, _ in window.model.named_parameters()}
    whole = sum(_size(value) ** 2 for name, value in expected.items() if name in names) ** 0.5
    for name, value in expected.items():
        other = together[name]
        if value is None or other is None:
            wrong = value is not other
        elif not value.is_floating_point():
            wrong = not torch.equal(value, other)
        else:
            coarse = torch.finfo(window.autocast or value.dtype).eps
            if tf32(device) and value.dtype == torch.float32:
                coarse = max(coarse, 2.0**-10)
            # A value that consists of rounding is compared with a part of the whole norm.
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
def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, before in buffers:
        buffer.copy_(before)


def _drawing_module(window: Window, inputs: Nested, targets: Nested) -> str:
    """The innermost module that draws random numbers."""
    drawing: list[str] = []
    before: dict[nn.Module, Any] = {}
    handles = []
    for name, module in window.model.named_modules():

        def enter(module: nn.Module, arguments: Any) -> None:
            before[module] = random_state()

        def leave(module: nn.Module, arguments: Any, outputs: Any, name: str = name) -> None:
            if not same_state(before[module], random_state()):
                drawing.append(f"{name or 'the model'} ({type(module).__name__})")

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        window.backward(inputs, targets, steps=1)
    finally:
        for handle in handles:
            handle.remove()
    return drawing[0] if drawing else "the loss"
