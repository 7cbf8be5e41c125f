"""`trainer.graph=true`: builds the recorder of a run's graphs, and checks first that its window replays."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..accum import CudaGraphs, GraphedWindow, GraphRecorder, OptimizerStep, Window
from ..accum.graph import can_be_recorded
from ..data import Batch, Batches, ResidentBatches
from ..environment.random_state import random_state, restore_random_state, same_state
from ..errors import UsageError

log = logging.getLogger(__name__)

# A replay launches the same kernels as the recorded window: only the order of sums may differ.
TOLERANCE = 1e-3
TOLERANCE_16 = 3e-2


def graphs(window: Window, train: Batches, device: torch.device) -> GraphRecorder:
    """The recorder for windows over `train`.

    Raises:
        UsageError: with the reason, where such a window cannot be replayed.
    """
    if device.type != "cuda":
        raise UsageError(f"trainer.graph=true: CUDA graphs need a GPU, not device={device}; leave it out")
    if not isinstance(train, ResidentBatches):
        raise UsageError(
            "trainer.graph=true: replays what is on the device, and this data is streamed; "
            "give data.resident=true, or leave it out"
        )
    return checked_recorder(window, train, partial(CudaGraphs, device))


def checked_recorder(window: Window, train: Batches, recorder: Callable[[], GraphRecorder]) -> GraphRecorder:
    """A recorder, after a copy of `window` was recorded on one batch and replayed right on another.

    The run itself does not change.

    Raises:
        UsageError: with the reason, if the window cannot be recorded or a replay computes something else.
    """
    name = type(window.model).__name__
    before = random_state()
    try:
        batches = [next(iter(train.epoch(epoch))) for epoch in (0, 1)]
        eager, replayed, drawn = _both(window, batches, recorder())
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"trainer.graph=true: {name} cannot be recorded as a graph: {reason}") from error
    finally:
        restore_random_state(before)
    if drawn:
        raise UsageError(
            f"trainer.graph=true: {name} draws random numbers on the host, which a graph would repeat"
        )
    low = window.autocast is not None or any(p.element_size() == 2 for p in window.model.parameters())
    # A gradient that is zero in theory is rounding alone: compare it with a part of the whole norm.
    whole = float(torch.stack([wanted.double().norm() for wanted in eager]).norm())
    errors = [
        float((result - wanted).double().norm()) / max(float(wanted.double().norm()), 1e-3 * whole, 1e-30)
        for result, wanted in zip(replayed, eager, strict=True)
    ]
    off = max(errors) if all(map(math.isfinite, errors)) else math.nan
    if not off <= (TOLERANCE_16 if low else TOLERANCE):
        raise UsageError(
            f"trainer.graph=true: a replay of {name} is off by {off:.1e} of a gradient's norm: its "
            "forward does not launch the same kernels for every batch; leave it out"
        )
    return recorder()


def warn_of_eager_step(step: OptimizerStep) -> None:
    """Warns of an optimizer whose step is not recorded."""
    if not can_be_recorded(step):
        name = type(step.optimizer).__name__
        log.warning("trainer.graph: the step of %s is not recorded, only the window is", name)


def _both(
    window: Window, batches: list[Batch], record: GraphRecorder
) -> tuple[list[Tensor], list[Tensor], bool]:
    """Gradients of the second batch, eager and replayed from a graph of the first batch.

    Returns:
        Eager and replayed gradients, and whether the eager window drew random numbers on the host.
    """
    model = copy.deepcopy(window.model)
    if getattr(window.model, "_compiled_call_impl", None) is not None:
        model.compile()  # a copy is not compiled
    if window.loss_scale is not None:
        scale = copy.deepcopy(window.loss_scale)
        scale.scale.fill_(1.0)
    else:
        scale = None
    copied = Window(
        model,
        copy.deepcopy(window.loss),
        window.steps,
        reduction=window.reduction,
        autocast=window.autocast,
        loss_scale=scale,
        local_loss=True,
    )
    graphed = GraphedWindow(copied, record)
    start = random_state()

    def gradients(batch: Batch) -> list[Tensor]:
        restore_random_state(start)
        model.zero_grad(set_to_none=False)
        graphed.backward(batch.inputs, batch.targets, steps=batch.steps, samples=batch.samples)
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    first, second = batches
    gradients(first)
    if copied.passes > 1:  # after the first window, in which weights may turn out to depend on outputs
        raise UsageError(
            "trainer.graph=true: the loss needs the outputs of the whole window first, in a pass of its own, "
            "which is not recorded; leave it out"
        )
    on_host = _host(model, start)
    eager = gradients(second)
    drawn = not same_state(on_host, _host(model, random_state(devices=False)))
    gradients(first)
    return eager, gradients(second), drawn


def _host(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The host's generators in `state`; torch's CPU generator only where `model` is on a GPU."""
    keys = ("python", "numpy", "torch") if next(model.parameters()).is_cuda else ("python", "numpy")
    return {key: state[key] for key in keys}
