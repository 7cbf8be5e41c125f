"""Composer's Trainer with `device_train_microbatch_size`: the loader yields the whole batch of an update.

The Trainer's loss of a batch weighs its micro-batches by their samples;
`accumulate_train_batch_on_tokens=True` weighs them by tokens, which is not its default. Left out: `bf16`,
which it refuses on a CPU.
"""

# The package is not installed where types are checked, and this module has its name.
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportCallIssue=false
from __future__ import annotations

from typing import Any

from composer import ComposerModel, Trainer
from composer.algorithms import GradientClipping
from composer.optim import ConstantScheduler, ConstantWithWarmupScheduler
from torch import Tensor

from ..models import model_of
from ..samples import loader_of
from ..settings import WARM_UP_UPDATES, Setting, Watch, cross_entropy, general_but, optimizer_of, quiet

PACKAGE = "mosaicml"
SETTINGS = general_but("bf16")


class Classifier(ComposerModel):
    """The user's model."""

    def __init__(self, setting: Setting, watch: Watch) -> None:
        super().__init__()
        self.model = watch(model_of(setting, setting.dtype(watch)))
        self.loss_of = cross_entropy(setting)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.model(batch[0])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor], *arguments: Any, **keywords: Any) -> Tensor:
        return self.loss_of(outputs, batch[1])


def fit(setting: Setting, watch: Watch, steps: int, micro: int) -> None:
    warm_up = ConstantWithWarmupScheduler(t_warmup=f"{WARM_UP_UPDATES}ba")
    clipping = [] if setting.clip_norm is None else [GradientClipping("norm", setting.clip_norm)]
    with quiet():
        model = Classifier(setting, watch)
        trainer = Trainer(
            model=model,
            train_dataloader=loader_of(
                setting, steps * micro, setting.dtype(watch), sharded=setting.processes > 1
            ),
            optimizers=optimizer_of(setting, model),
            schedulers=warm_up if setting.schedule else ConstantScheduler(),
            algorithms=clipping,
            max_duration=f"{setting.epochs}ep",
            device_train_microbatch_size=micro,
            precision="fp32",
            device="cpu",
            seed=setting.seed,
            progress_bar=False,
            console_stream="stdout",
        )
        trainer.fit()
        trainer.close()
