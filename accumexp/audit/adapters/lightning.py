"""Lightning's Trainer with `accumulate_grad_batches`."""

# The package is not installed where types are checked, and this module has its name.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor

from ..models import model_of
from ..samples import loader_of
from ..settings import GENERAL, Setting, Watch, cross_entropy, optimizer_of, quiet, schedule_of

PACKAGE = "lightning"
SETTINGS = GENERAL


class Classifier(lightning.LightningModule):
    """The user's module."""

    def __init__(self, setting: Setting, watch: Watch) -> None:
        super().__init__()
        self.setting = setting
        self.model = watch(model_of(setting, setting.dtype(watch)))
        self.loss_of = cross_entropy(setting)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        inputs, labels = batch
        return self.loss_of(self.model(inputs), labels)

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.setting, self.model)
        schedule = schedule_of(self.setting, optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(setting: Setting, watch: Watch, steps: int, micro: int) -> None:
    ranks: dict[str, Any] = {"devices": 1}
    if setting.processes > 1:
        # Its own sampler of several ranks shuffles.
        ranks = {"devices": setting.processes, "strategy": "ddp", "plugins": TorchElasticEnvironment()}
        ranks["use_distributed_sampler"] = False
    with quiet():
        trainer = lightning.Trainer(
            accelerator="cpu",
            accumulate_grad_batches=steps,
            max_epochs=setting.epochs,
            gradient_clip_val=setting.clip_norm,
            precision="bf16-mixed" if setting.mixed else precision_of(setting.dtype(watch)),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **ranks,
        )
        sharded = setting.processes > 1
        loader = loader_of(setting, micro, setting.dtype(watch), sharded=sharded)
        trainer.fit(Classifier(setting, watch), loader)


def precision_of(dtype: torch.dtype) -> Any:
    return "64-true" if dtype == torch.float64 else "32-true"
