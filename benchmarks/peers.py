"""Training loops of other frameworks, as their guides to gradient accumulation show them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from accumexp.environment.device import wait_for

from .loops import Loop
from .tasks import SEED, Samples, Task


class OnAccelerate(Loop):
    """Keeps the global state of Accelerate apart, which two of the loops use in one process."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._state: list[dict[str, Any]] = [{}, {}, {}]
        with self.state():
            self.prepare()

    def prepare(self) -> None:
        raise NotImplementedError

    @contextlib.contextmanager
    def state(self) -> Iterator[None]:
        """Inside, Accelerate's global state is this loop's."""
        from accelerate.state import AcceleratorState, GradientState, PartialState

        shared: list[Any] = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
        others = [dict(state) for state in shared]
        _exchange(shared, self._state)
        try:
            yield
        finally:
            self._state = [dict(state) for state in shared]
            _exchange(shared, others)

    def seconds(self) -> float:
        with self.state():
            return self.epoch_seconds()

    def epoch_seconds(self) -> float:
        return super().seconds()


def _exchange(shared: list[Any], values: list[dict[str, Any]]) -> None:
    for state, value in zip(shared, values, strict=True):
        state.clear()
        state.update(value)


class Accelerate(OnAccelerate):
    """The loop of Accelerate's guide to gradient accumulation."""

    name = "accelerate"

    def prepare(self) -> None:
        from accelerate import Accelerator

        task = self.task
        self.accelerator = Accelerator(
            gradient_accumulation_steps=task.steps, cpu=task.device.type == "cpu", mixed_precision="no"
        )
        prepared = self.accelerator.prepare(self.model, self.optimizer, task.loader())
        self.prepared_model, self.prepared_optimizer, self.loader = prepared

    def epoch(self) -> None:
        accelerator, model, optimizer = self.accelerator, self.prepared_model, self.prepared_optimizer
        for *inputs, targets in self.loader:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(*inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()


class Fabric(Loop):
    """The loop of Fabric's guide to efficient gradient accumulation."""

    name = "fabric"

    def __init__(self, task: Task) -> None:
        from lightning.fabric import Fabric as LightningFabric

        super().__init__(task)
        self.fabric: Any = LightningFabric(**lightning_options(task))
        self.fabric_model, self.fabric_optimizer = self.fabric.setup(self.model, self.optimizer)
        self.loader = self.fabric.setup_dataloaders(task.loader())

    def epoch(self) -> None:
        fabric, model, optimizer = self.fabric, self.fabric_model, self.fabric_optimizer
        steps = self.task.steps
        for step, (*inputs, targets) in enumerate(self.loader, 1):
            accumulating = step % steps != 0
            with fabric.no_backward_sync(model, enabled=accumulating):
                fabric.backward(cross_entropy(model(*inputs), targets) / steps)
            if not accumulating:
                optimizer.step()
                optimizer.zero_grad()


class LightningTrainer(Loop):
    """A new Trainer every epoch, timed from the start of its first batch to the end of its last."""

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
                *inputs, targets = batch
                return cross_entropy(self.model(*inputs), targets)

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
            **lightning_options(task),
            accumulate_grad_batches=task.steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def seconds(self) -> float:
        clock = self.clock(self.task.updates)
        self.trainer(max_epochs=1, callbacks=[clock]).fit(self.module, self.loader)
        assert clock.seconds
        return clock.seconds


class Named(Dataset[dict[str, Tensor]]):
    """Samples for transformers' Trainer: dicts by the names of the model's arguments."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        *inputs, labels = self.samples[index]
        return {f"input_{k}": tensor for k, tensor in enumerate(inputs)} | {"labels": labels}


class WithLoss(nn.Module):
    """A model that returns its loss if it gets labels, as transformers' models do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_0: Tensor, input_1: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.model(input_0) if input_1 is None else self.model(input_0, input_1)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels)}


class TransformersTrainer(OnAccelerate):
    """A new Trainer of transformers every epoch, timed from its begin to the end of the last update."""

    name = "transformers"

    def prepare(self) -> None:
        from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

        task = self.task
        self._folder = tempfile.TemporaryDirectory()
        given = TrainingArguments(
            output_dir=self._folder.name,
            per_device_train_batch_size=task.micro_batch,
            gradient_accumulation_steps=task.steps,
            num_train_epochs=1,
            max_grad_norm=0.0,  # no clipping, as elsewhere
            save_strategy="no",
            logging_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=task.device.type == "cpu",
            full_determinism=False,
            seed=SEED,
        )
        model, optimizer, samples = WithLoss(self.model), self.optimizer, Named(task.dataset())
        constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)

        class Clock(TrainerCallback):
            start = end = 0.0

            def on_epoch_begin(self, *_: Any, **__: Any) -> None:
                wait_for(task.device)
                self.start = perf_counter()

            def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
                if state.global_step == task.updates:
                    wait_for(task.device)
                    self.end = perf_counter()

        def trainer(clock: TrainerCallback) -> Any:
            made = Trainer(
                model, given, train_dataset=samples, optimizers=(optimizer, constant), callbacks=[clock]
            )
            made.remove_callback(PrinterCallback)
            return made

        self.clock, self.trainer = Clock, trainer

    def epoch_seconds(self) -> float:
        clock = self.clock()
        self.trainer(clock).train()
        assert clock.end > clock.start > 0
        return clock.end - clock.start

    def close(self) -> None:
        self._folder.cleanup()


def lightning_options(task: Task) -> dict[str, Any]:
    kind = task.device.type
    # Keeps the model's precision: "64-true" would round Fabric's outputs to float32.
    return {"accelerator": "gpu" if kind == "cuda" else kind, "devices": 1, "precision": "32-true"}


PEERS: tuple[type[Loop], ...] = (Accelerate, Fabric, LightningTrainer, TransformersTrainer)
