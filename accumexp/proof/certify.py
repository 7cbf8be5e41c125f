"""`certify`: the certificate of any training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from .arguments import batches_of, check_model, check_optimizer, check_schedule, told_apart
from .certificate import Certificate
from .checks import Proof
from .problem import Problem, Scaling, TrainWindow, WholeBatch, forked_rng
from .ranks import world_size


def certify(
    train_window: TrainWindow,
    model: nn.Module,
    loss: Any,
    batch: WholeBatch | Sequence[WholeBatch],
    steps: int,
    *,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    scheduler: Callable[[Optimizer], Any] | None = None,
    clip_norm: float | None = None,
    prepare: Callable[[nn.Module], nn.Module] | None = None,
    precision: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    loss_scale: Scaling | None = None,
    updates: int = 100,
    seed: int = 0,
    clip_value: float | None = None,
    drop_last: bool = False,
    transform_gradient: Callable[[nn.Module], Any] | None = None,
    perturb: Callable[[nn.Module], Any] | None = None,
    state: Mapping[str, nn.Module | Tensor] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Certificate:
    """Certifies that `train_window` makes the update of the larger batch, or says why it does not.

    The loop runs on copies of `model`, in fp64 and in its own precision, and is observed through hooks.
    The larger batch's update is computed on the whole batch in one piece. Under
    torch.distributed every rank calls with the whole batch, of which its loop takes its share.

    Args:
        train_window: called as `train_window(model, optimizer, batch, steps)`, with the schedule as a
            fifth argument if there is one. Makes one update of `model` on `batch`, (inputs, targets) of all
            its samples, in `steps` micro-batches (fewer for the smaller last batch of an epoch), clips, steps
            and zeroes. May return the loss that it would log.
        model: in the mode it is trained in. It is not changed.
        loss: a function of (outputs, targets) to a mean, of shape (); or an object with `weight(targets)` and
            `total(outputs, targets)`, whose quotient is the mean. Of several terms: a function that returns
            them by name, as means over samples or as named tuples with `total`, `weight` and `coefficient`,
            or an object with `terms(outputs, targets)`. With an attribute `couples = True` it is computed on
            all outputs of the batch at once. If it has tensors (class weights), the loop's criterion should
            be the same object: it is moved to fp64 and back with the model.
        batch: (inputs, targets) of one update, samples first; or a list of several such pairs, of which the
            first is a whole batch. A single batch whose inputs and targets are both pairs must be in a list.
        steps: micro-batches in a full window, on each rank.
        optimizer: makes the loop's optimizer from parameters; SGD with momentum by default.
        scheduler: makes the schedule from an optimizer; the loop steps it once an update.
        clip_norm: the 2-norm to which the loop clips the update's gradient.
        prepare: wraps a copy of the model before its optimizer is made (DistributedDataParallel,
            fully_shard); its result is the loop's `model`.
        precision: dtype of the parameters in the loop's own precision.
        autocast: dtype of its `torch.autocast`, which the loop itself enters.
        loss_scale: the settings of its loss scale, if it has a dynamic one.
        updates: number of updates that are replayed in fp64, at least 1.
        seed: of torch's generators in every window.
        clip_value: the largest absolute value of its elements, which the loop clamps after `clip_norm`.
        drop_last: whether the loop's loader drops the smaller last batch of an epoch: only whole windows are
            checked.
        transform_gradient: what the loop does to the window's whole gradient before it clips (an L2
            penalty, adaptive clipping); called with a model that has the larger batch's gradient in `.grad`,
            which it changes in place.
        perturb: moves the weights of the model it is called with by their `.grad`, in place; the update's
            gradient is then taken there (sharpness-aware minimisation).
        state: modules and tensors outside the model that the loop changes in place (an averaged copy, a
            loss's buffers). After every window they must be what the loop makes of them with `steps=1`.
            Frozen parameters and buffers of the model that the loop changes are compared in the same way.
        progress: called with a description when a stage begins.

    Raises:
        ValueError: for a batch that cannot be split into `steps`, a larger batch without a finite gradient,
            `updates` below 1, a model without trainable parameters or with lazy ones, an optimizer or a
            schedule whose `step()` needs arguments.
    """
    if updates < 1:
        raise ValueError(f"updates={updates}: without an update that is followed there is nothing to certify")
    batches, notes = told_apart(batches_of(batch))
    check_model(model)
    optimizer = optimizer or partial(SGD, lr=0.1, momentum=0.9)
    problem = Problem(
        train_window,
        model,
        loss,
        batches,
        steps,
        optimizer,
        scheduler,
        clip_norm,
        prepare,
        precision,
        autocast,
        loss_scale,
        seed,
        clip_value=clip_value,
        drop_last=drop_last,
        transform_gradient=transform_gradient,
        perturb=perturb,
        state=state or {},
    )
    if steps < 1 or problem.samples < steps * world_size():
        raise ValueError(f"steps={steps}: a batch of {problem.samples} samples cannot be split into them")
    with forked_rng(problem.device), torch.enable_grad():
        if prepare is None:
            check_optimizer(model, optimizer)
        check_schedule(model, optimizer, scheduler)
        certificate = Proof(problem, progress or (lambda stage: None)).certificate(updates)
        return replace(certificate, notes=[*notes, *certificate.notes])
