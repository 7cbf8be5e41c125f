"""Accelerate's documented loop with `accelerator.accumulate(model)`."""

from __future__ import annotations

from accelerate import Accelerator

from ..models import model_of
from ..samples import loader_of
from ..settings import (
    GENERAL,
    Setting,
    Watch,
    cross_entropy,
    new_accelerate,
    optimizer_of,
    quiet,
    schedule_of,
)

PACKAGE = "accelerate"
SETTINGS = GENERAL


def fit(setting: Setting, watch: Watch, steps: int, micro: int) -> None:
    with quiet(), new_accelerate():
        accelerator = Accelerator(
            gradient_accumulation_steps=steps,
            mixed_precision="bf16" if setting.mixed else "no",
            cpu=True,
        )
        model = watch(model_of(setting, setting.dtype(watch)))
        loss_of = cross_entropy(setting)
        optimizer = optimizer_of(setting, model)
        model, optimizer, loader, schedule = accelerator.prepare(
            model,
            optimizer,
            loader_of(setting, micro, setting.dtype(watch)),
            schedule_of(setting, optimizer),
        )
        for _ in range(setting.epochs):
            for inputs, labels in loader:
                with accelerator.accumulate(model):
                    loss = loss_of(model(inputs), labels)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and setting.clip_norm is not None:
                        accelerator.clip_grad_norm_(model.parameters(), setting.clip_norm)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
