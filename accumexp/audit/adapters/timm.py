"""timm's training loop, as `train_one_epoch` of its repository's train.py runs it.

The distribution has the loop's parts (`ClassificationTask`, `NativeScaler`, `dispatch_clip_grad`,
schedules) and not the loop itself, so that it is written here: windows of `steps` micro-batches, where the
number of micro-batches left over at the end of an epoch replaces `steps` from the last window's first
micro-batch on.

Left out: `tokens`, as timm trains images.
"""

# The package is not installed where types are checked.
# pyright: reportMissingImports=false
from __future__ import annotations

from contextlib import nullcontext

import torch
from timm.scheduler import StepLRScheduler
from timm.task import ClassificationTask
from timm.utils import dispatch_clip_grad
from torch.utils.data import DataLoader

from ..models import model_of
from ..samples import loader_of
from ..settings import (
    LEARNING_RATE,
    WARM_UP_UPDATES,
    Setting,
    Watch,
    cross_entropy,
    general_but,
    optimizer_of,
    quiet,
)

PACKAGE = "timm"
SETTINGS = general_but("tokens")


def fit(setting: Setting, watch: Watch, steps: int, micro: int) -> None:
    dtype, several = setting.dtype(watch), setting.processes > 1
    with quiet():
        model = watch(model_of(setting, dtype))
        task = ClassificationTask(model, cross_entropy(setting), dtype=dtype, verbose=False)
        if several:
            task.prepare_distributed()
        optimizer = optimizer_of(setting, model)
        schedule = schedule_by_update(optimizer) if setting.schedule else None
        loader = loader_of(setting, micro, dtype, sharded=several)
        for epoch in range(setting.epochs):
            train_one_epoch(setting, epoch, task, loader, optimizer, schedule, steps)


def schedule_by_update(optimizer: torch.optim.Optimizer) -> StepLRScheduler:
    return StepLRScheduler(
        optimizer,
        decay_t=1_000_000,
        warmup_t=WARM_UP_UPDATES,
        warmup_lr_init=LEARNING_RATE / WARM_UP_UPDATES,
        t_in_epochs=False,
    )


def train_one_epoch(
    setting: Setting,
    epoch: int,
    task: ClassificationTask,
    loader: DataLoader,
    optimizer: torch.optim.Optimizer,
    schedule: StepLRScheduler | None,
    steps: int,
) -> None:
    left_over = len(loader) % steps
    tail = len(loader) - left_over
    updates = epoch * -(-len(loader) // steps)
    task.get_trainable_module().train()
    optimizer.zero_grad()
    for index, (inputs, labels) in enumerate(loader):
        update = index == len(loader) - 1 or (index + 1) % steps == 0
        if index >= tail:
            steps = left_over
        with nullcontext() if update else task.no_sync():
            with torch.autocast("cpu", torch.bfloat16, enabled=setting.mixed):
                loss = task(inputs, labels)["loss"] / steps
            loss.backward()
        if not update:
            continue
        if setting.clip_norm is not None:
            dispatch_clip_grad(task.get_clip_parameters(), setting.clip_norm, mode="norm")
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        if schedule is not None:
            schedule.step_update(updates)
