"""transformers.Trainer, with a user's own module or a model of transformers.

The `own_loss` is a `compute_loss_func`, which divides by `num_items_in_batch` as the documentation tells
users to. The optimizer is the Trainer's default, AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..models import CAUSAL, WithLoss, model_of
from ..samples import PADDING, collate, samples_of
from ..settings import (
    GENERAL,
    IGNORED,
    WARM_UP_UPDATES,
    Setting,
    Watch,
    cross_entropy,
    focal_losses,
    new_accelerate,
    optimizer_of,
    quiet,
)

PACKAGE = "transformers"
SETTINGS = (*GENERAL, "sequence_classification", "token_classification", "masked_lm", "causal_lm")


def fit(setting: Setting, watch: Watch, steps: int, micro: int) -> None:
    dtype = setting.dtype(watch)
    model = model_of(setting, dtype)
    if setting.model == "mlp":
        model = WithLoss(model, cross_entropy(setting))
    model = watch(model)
    with TemporaryDirectory() as folder, quiet(), new_accelerate():
        trainer = Trainer(
            model,
            TrainingArguments(folder, **arguments_of(setting, steps, micro)),
            data_collator=partial(named, setting),
            train_dataset=samples_of(setting, dtype),  # type: ignore[arg-type]
            compute_loss_func=own_loss_of(setting),
            optimizers=(optimizer_of(setting, model) if setting.groups else None, None),
            callbacks=[ReportLoss(watch)],
        )
        trainer.train()


def arguments_of(setting: Setting, steps: int, micro: int) -> dict[str, Any]:
    """The arguments of the training, for TrainingArguments and the classes that inherit from it."""
    return {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": steps,
        "num_train_epochs": setting.epochs,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant_with_warmup" if setting.schedule else "constant",
        "warmup_steps": WARM_UP_UPDATES if setting.schedule else 0,
        "max_grad_norm": setting.clip_norm or 0.0,
        "label_smoothing_factor": setting.label_smoothing,
        "bf16": setting.mixed,
        "seed": setting.seed,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def named(setting: Setting, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A micro-batch under the names of the model's arguments."""
    inputs, labels = collate(samples)
    if setting.model == "mlp":
        return {"inputs": inputs, "labels": labels}
    return {"input_ids": inputs, "attention_mask": (inputs != PADDING).long(), "labels": labels}


def own_loss_of(setting: Setting) -> Callable[..., Tensor] | None:
    """The user's own loss as a `compute_loss_func`: the micro-batch's sum, divided by the update's labels."""
    if not setting.own_loss:
        return None

    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        logits = outputs["logits"]
        if setting.model in CAUSAL:
            logits, labels = logits[:, :-1], labels[:, 1:]
        items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return focal_losses(logits, labels).sum() / items

    return loss_of


class ReportLoss(TrainerCallback):
    """Hands the loss that the Trainer logs to `watch`."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **keywords: Any) -> None:
        if "loss" in logs:
            self.watch.loss(logs["loss"])
