"""ignite's `create_supervised_trainer(gradient_accumulation_steps=...)`.

Left out: `clipping`, for which the function has no option, and `bf16`, as its `amp_mode="amp"` is autocast
of CUDA. The schedule steps on `Events.ITERATION_COMPLETED(every=steps)`.
"""

# The package is not installed where types are checked.
# pyright: reportMissingImports=false
from __future__ import annotations

import torch
from ignite.engine import Events, create_supervised_trainer
from torch.nn.parallel import DistributedDataParallel

from ..models import model_of
from ..samples import loader_of
from ..settings import Setting, Watch, cross_entropy, general_but, optimizer_of, quiet, schedule_of

PACKAGE = "pytorch-ignite"
SETTINGS = general_but("clipping", "bf16")


def fit(setting: Setting, watch: Watch, steps: int, micro: int) -> None:
    dtype, several = setting.dtype(watch), setting.processes > 1
    model: torch.nn.Module = watch(model_of(setting, dtype))
    optimizer = optimizer_of(setting, model)
    schedule = schedule_of(setting, optimizer)
    with quiet():
        trainer = create_supervised_trainer(
            DistributedDataParallel(model) if several else model,
            optimizer,
            cross_entropy(setting),
            gradient_accumulation_steps=steps,
        )
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=steps), lambda: schedule.step())
        trainer.run(loader_of(setting, micro, dtype, sharded=several), max_epochs=setting.epochs)
