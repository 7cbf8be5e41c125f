"""Lightning Fabric's documented loop with `fabric.no_backward_sync(model, enabled=is_accumulating)`.

The documentation's example leaves the loss's factor to the user and steps where `iteration % steps == 0`,
so that an epoch's first update has one micro-batch. Here the loss is divided by `steps`, and an update ends
after each `steps` micro-batches and after an epoch's last one.
"""

# The package is not installed where types are checked.
# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments import TorchElasticEnvironment

from ..models import model_of
from ..samples import loader_of
from ..settings import GENERAL, Setting, Watch, cross_entropy, optimizer_of, quiet, schedule_of

PACKAGE = "lightning"
SETTINGS = GENERAL


def fit(setting: Setting, watch: Watch, steps: int, micro: int) -> None:
    dtype = setting.dtype(watch)
    full: Any = "64-true" if dtype == torch.float64 else "32-true"
    ranks: dict[str, Any] = {"devices": 1}
    if setting.processes > 1:
        ranks = {"devices": setting.processes, "strategy": "ddp", "plugins": TorchElasticEnvironment()}
    with quiet():
        fabric = Fabric(accelerator="cpu", precision="bf16-mixed" if setting.mixed else full, **ranks)
        fabric.launch()
        model = watch(model_of(setting, dtype))
        loss_of = cross_entropy(setting)
        model, optimizer = fabric.setup(model, optimizer_of(setting, model))
        schedule = schedule_of(setting, optimizer)
        loader = fabric.setup_dataloaders(loader_of(setting, micro, dtype))
        for _ in range(setting.epochs):
            for iteration, (inputs, labels) in enumerate(loader, 1):
                is_accumulating = iteration % steps != 0 and iteration < len(loader)
                with fabric.no_backward_sync(model, enabled=is_accumulating):
                    fabric.backward(loss_of(model(inputs), labels) / steps)
                if not is_accumulating:
                    if setting.clip_norm is not None:
                        fabric.clip_gradients(model, optimizer, max_norm=setting.clip_norm)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
