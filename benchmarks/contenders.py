"""LeNet-5 at one update's work: written by hand, under accumexp, and under its peers as their guides show."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from accumexp.callbacks import Callback
from accumexp.data import Digits
from accumexp.models import LeNet5
from accumexp.system import wait_for
from accumexp.trainer import Trainer

SEED = 0


@dataclass(frozen=True)
class Task:
    """What every contender trains on: the first `samples` of the digits, a whole number of updates."""

    device: torch.device
    micro_batch: int
    steps: int
    deterministic: bool
    samples: int

    @property
    def batch(self) -> int:
        return self.micro_batch * self.steps

    def dataset(self) -> TensorDataset:
        images, labels = Digits(train=True).tensors
        return TensorDataset(images[: self.samples], labels[: self.samples])

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset(), batch_size=self.micro_batch, shuffle=True)


class Contender:
    """A way to train, an epoch at a time."""

    name: ClassVar[str]

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model: nn.Module = LeNet5().to(task.device)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)

    def seconds(self) -> float:
        """Trains for an epoch and returns the seconds that took, the device's included."""
        wait_for(self.task.device)
        start = perf_counter()
        self.epoch()
        wait_for(self.task.device)
        return perf_counter() - start

    def flush(self) -> None:
        """What is still to be done at the end of a round, on the clock."""

    def epoch(self) -> None:
        raise NotImplementedError

    def close(self) -> None: ...


class HandWritten(Contender):
    name = "hand-written"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.images, self.labels = (tensor.to(task.device) for tensor in task.dataset().tensors)

    def epoch(self) -> None:
        steps = self.task.steps
        order = torch.randperm(len(self.images), device=self.task.device)
        for chosen in order.split(self.task.batch):
            images, labels = self.images[chosen], self.labels[chosen]
            self.optimizer.zero_grad()
            for x, y in zip(images.chunk(steps), labels.chunk(steps), strict=True):
                (cross_entropy(self.model(x), y) / steps).backward()
            self.optimizer.step()


class SingleBatch(HandWritten):
    name = "single-batch"

    def __init__(self, task: Task) -> None:
        super().__init__(replace(task, micro_batch=task.batch, steps=1))


class HandWrittenLoader(Contender):
    name = "dataloader"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.loader = task.loader()

    def epoch(self) -> None:
        steps, device = self.task.steps, self.task.device
        for step, (images, labels) in enumerate(self.loader, 1):
            loss = cross_entropy(self.model(images.to(device)), labels.to(device)) / steps
            loss.backward()
            if step % steps == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()


class Accelerate(Contender):
    """The loop of Accelerate's guide to gradient accumulation."""

    name = "accelerate"

    def __init__(self, task: Task) -> None:
        from accelerate import Accelerator

        super().__init__(task)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=task.steps, cpu=task.device.type == "cpu", mixed_precision="no"
        )
        prepared = self.accelerator.prepare(self.model, self.optimizer, task.loader())
        self.prepared_model, self.prepared_optimizer, self.loader = prepared

    def epoch(self) -> None:
        accelerator, model, optimizer = self.accelerator, self.prepared_model, self.prepared_optimizer
        for images, labels in self.loader:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()


class Fabric(Contender):
    """The loop of Fabric's guide to efficient gradient accumulation."""

    name = "fabric"

    def __init__(self, task: Task) -> None:
        from lightning.fabric import Fabric as LightningFabric

        super().__init__(task)
        self.fabric: Any = LightningFabric(accelerator=lightning_accelerator(task.device), devices=1)
        self.fabric_model, self.fabric_optimizer = self.fabric.setup(self.model, self.optimizer)
        self.loader = self.fabric.setup_dataloaders(task.loader())

    def epoch(self) -> None:
        fabric, model, optimizer, steps = (
            self.fabric,
            self.fabric_model,
            self.fabric_optimizer,
            self.task.steps,
        )
        for step, (images, labels) in enumerate(self.loader, 1):
            accumulating = step % steps != 0
            with fabric.no_backward_sync(model, enabled=accumulating):
                fabric.backward(cross_entropy(model(images), labels) / steps)
            if not accumulating:
                optimizer.step()
                optimizer.zero_grad()


class LightningTrainer(Contender):
    """A Trainer an epoch; its clock goes from the first batch's start to the last one's end."""

    name = "lightning"

    def __init__(self, task: Task) -> None:
        import lightning

        super().__init__(task)
        model, optimizer = self.model, self.optimizer

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                images, labels = batch
                return cross_entropy(self.model(images), labels)

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return optimizer

        class Clock(lightning.Callback):
            def __init__(self, updates: int) -> None:
                self.updates = updates
                self.start: float | None = None
                self.seconds = 0.0

            def on_train_batch_start(self, *_: Any, **__: Any) -> None:
                if self.start is None:
                    wait_for(task.device)
                    self.start = perf_counter()

            def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any, **__: Any) -> None:
                if trainer.global_step == self.updates:
                    assert self.start is not None
                    wait_for(task.device)
                    self.seconds = perf_counter() - self.start

        self.module, self.loader, self.clock = Module(), task.loader(), Clock
        self.trainer: Callable[..., Any] = partial(
            lightning.Trainer,
            accelerator=lightning_accelerator(task.device),
            devices=1,
            accumulate_grad_batches=task.steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def seconds(self) -> float:
        clock = self.clock(self.task.samples // self.task.batch)
        self.trainer(max_epochs=1, callbacks=[clock]).fit(self.module, self.loader)
        assert clock.seconds
        return clock.seconds


class StopAtUpdate(Callback):
    """Ends `fit` as a signal does, so that the same Trainer goes on with the next epoch."""

    def __init__(self) -> None:
        self.update = 0

    def update_end(self, trainer: Trainer) -> None:
        if trainer.progress.update == self.update:
            trainer.stop("end of the round")


class Accumexp(Contender):
    """The Trainer that `accumexp.run` builds, with its metrics, its journal and its MLflow run."""

    name = "accumexp"

    def __init__(self, task: Task) -> None:
        from hydra import compose, initialize_config_dir

        from accumexp.assembly import build_parts, build_trainer
        from accumexp.compose import conf_dir
        from accumexp.config import from_hydra
        from accumexp.order import Order
        from accumexp.record import RunRecord, open_tracker, write_config
        from accumexp.tracking import Store

        self.task = task
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        overrides = [
            "optimizer.lr=0.01",
            f"accum.micro_batch_size={task.micro_batch}",
            f"accum.steps={task.steps}",
            "data.eval_fraction=0",
            "callbacks=none",
            "+callbacks.stop._target_=benchmarks.contenders.StopAtUpdate",
            "trainer.epochs=1000000",
            "trainer.eval_every=1000000",
            f"trainer.deterministic={str(task.deterministic).lower()}",
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
            # Its thread would run in every contender's epochs.
            "tracking.system_metrics=false",
            # Others' time must not count towards the next flush: `flush` is called every round.
            "tracking.flush_seconds=1000000",
            f"device={task.device}",
            f"seed={SEED}",
        ]
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            config = from_hydra(compose("config", overrides))
        parts = build_parts(config)
        parts.splits.train.indices = torch.arange(task.samples)
        self.record = RunRecord(folder)
        self.trainer = build_trainer(config, parts, self.record)
        self.model, self.optimizer = parts.model, self.trainer.optimizer
        write_config(folder, config)
        order = Order(config, folder, None, None, "python -m benchmarks.window")
        self.record.tracker = open_tracker(order, Store(config.tracking), parts, {}, None, None)
        stop = self.trainer.callbacks["stop"]
        assert isinstance(stop, StopAtUpdate)
        self.stop = stop

    def epoch(self) -> None:
        self.stop.update = self.trainer.progress.update + self.task.samples // self.task.batch
        self.trainer.go_on()
        self.trainer.fit()

    def flush(self) -> None:
        self.record.flush()

    def close(self) -> None:
        self.record.close("FINISHED")
        self._folder.cleanup()


CONTENDERS: dict[str, type[Contender]] = {
    kind.name: kind
    for kind in (HandWritten, SingleBatch, HandWrittenLoader, Accelerate, Fabric, LightningTrainer, Accumexp)
}


def lightning_accelerator(device: torch.device) -> str:
    return "gpu" if device.type == "cuda" else device.type
