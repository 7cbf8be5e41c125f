"""DeepSpeed's engine with `gradient_accumulation_steps`, without ZeRO, in the loop of its training guide.

It trains in fp32, as it reduces no gradients of fp64. Its first start compiles an operator, which takes
minutes.
"""

# The package is not installed where types are checked, and this module has its name.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import atexit
import os
from typing import Any
from unittest.mock import patch

import deepspeed
import torch

from ..models import model_of
from ..samples import loader_of
from ..settings import GENERAL, Setting, Watch, cross_entropy, optimizer_of, quiet, schedule_of

PACKAGE = "deepspeed"
DTYPE = torch.float32  # of the weights
SETTINGS = GENERAL

# As DeepSpeed's launcher sets it for one process.
ONE_PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def fit(setting: Setting, watch: Watch, steps: int, micro: int) -> None:
    several = setting.processes > 1
    with quiet(), patch.dict(os.environ, {} if several else ONE_PROCESS):
        if not torch.distributed.is_initialized():
            deepspeed.init_distributed("gloo")
            atexit.register(torch.distributed.destroy_process_group)  # the engine keeps groups between fits
        model = watch(model_of(setting, DTYPE))
        loss_of = cross_entropy(setting)
        optimizer = optimizer_of(setting, model)
        engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=schedule_of(setting, optimizer),
            config=config_of(setting, steps, micro),
        )
        loader = loader_of(setting, micro, DTYPE, sharded=several)
        for _ in range(setting.epochs):
            for inputs, labels in loader:
                loss = loss_of(engine(inputs), labels)
                engine.backward(loss)
                engine.step()


def config_of(setting: Setting, steps: int, micro: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": setting.clip_norm or 0.0,
        "torch_autocast": {"enabled": setting.mixed, "dtype": "bfloat16"},
    }
