"""The runs of `benchmarks.sweep` in Lightning: one after the other, in one process, with its MLflowLogger.

Data, split, model, optimizer, number of updates, evaluations and checkpoints are those of `accumexp.run`'s
defaults. Writes a `summary.json` a run below the folder that it is started in.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

from accumexp.data import Digits
from accumexp.models import LeNet5
from accumexp.tracking.json_file import write_json

from .measure import numbers


class Module(lightning.LightningModule):
    """LeNet-5 with momentum; what `accumexp.run` logs of a run is logged as often here.

    The accuracy in training is that of a logged micro-batch, not of its whole update.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = LeNet5()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        outputs = self.model(images)
        loss = cross_entropy(outputs, labels)
        if self.trainer._logger_connector.should_update_logs:
            right = (outputs.argmax(1) == labels).float().mean()
            self.log_dict({"train/loss": loss, "train/accuracy": right})
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "eval")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: list[Tensor], split: str) -> None:
        images, labels = batch
        outputs = self.model(images)
        right = (outputs.argmax(1) == labels).float().mean()
        self.log_dict({f"{split}/loss": cross_entropy(outputs, labels), f"{split}/accuracy": right})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def train(steps: int, seed: int, epochs: int, batch: int, folder: Path) -> dict[str, Any]:
    """One run as Lightning's guides show it: a logger, an evaluation and a checkpoint an epoch."""
    lightning.seed_everything(seed, verbose=False)
    whole, test = Digits(train=True), Digits(train=False)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    held_out = round(0.1 * len(whole))  # the eval split of accumexp.run
    training = DataLoader(Subset(whole, order[held_out:].tolist()), batch_size=batch // steps, shuffle=True)
    evaluation = DataLoader(Subset(whole, order[:held_out].tolist()), batch_size=256)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=steps,
        logger=MLFlowLogger(
            "lightning", run_name=f"steps={steps} seed={seed}", tracking_uri="sqlite:///mlflow.db"
        ),
        log_every_n_steps=10,
        callbacks=[
            ModelCheckpoint(folder / "checkpoints", monitor="eval/accuracy", mode="max", save_last=True)
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, training, evaluation)
    (tested,) = trainer.test(module, DataLoader(test, batch_size=256), verbose=False)
    final = {"accuracy": tested["test/accuracy"], "updates": trainer.global_step}
    return {"overrides": [f"accum.steps={steps}", f"seed={seed}"], "final": final}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lightning_runs", description=__doc__)
    parser.add_argument("--steps", type=numbers, required=True)
    parser.add_argument("--seeds", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="samples an update")
    options = parser.parse_args()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for steps in options.steps:
        for seed in range(options.seeds):
            folder = Path("runs", f"steps={steps},seed={seed}")
            folder.mkdir(parents=True)
            write_json(folder / "summary.json", train(steps, seed, options.epochs, options.batch, folder))


if __name__ == "__main__":
    main()
