"""Times one update of LeNet-5 under accumexp, written by hand and under its peers, interleaved.

python -m benchmarks.window --rounds 15 --json window.json
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import platform
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from accumexp.accum import measure_activations
from accumexp.callbacks import Callback
from accumexp.data import Digits
from accumexp.models import LeNet5
from accumexp.seeding import seed_everything
from accumexp.system import MIB, device_name, pick_device, wait_for
from accumexp.trainer import Trainer

SEED = 0
TOLERANCE = 1e-5
console = Console()
if not console.is_terminal:
    console = Console(width=110)  # a pipe or a file has no width of its own


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
    """A way to train. `run` trains for `epochs` and returns the seconds that took."""

    name: ClassVar[str]

    def __init__(self, task: Task) -> None:
        self.task = task
        self.model: nn.Module = LeNet5().to(task.device)
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)

    def run(self, epochs: int) -> float:
        wait_for(self.task.device)
        start = perf_counter()
        for _ in range(epochs):
            self.epoch()
        wait_for(self.task.device)
        return perf_counter() - start

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
    """A Trainer a run; its clock goes from the first batch's start to the last one's end."""

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

    def run(self, epochs: int) -> float:
        clock = self.clock(epochs * self.task.samples // self.task.batch)
        self.trainer(max_epochs=epochs, callbacks=[clock]).fit(self.module, self.loader)
        assert clock.seconds
        return clock.seconds


class StopAtUpdate(Callback):
    """Ends `fit` as a signal does, so that the same Trainer goes on in the next round."""

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
            f"+callbacks.stop._target_={__name__}.StopAtUpdate",
            "trainer.epochs=1000000",
            "trainer.eval_every=1000000",
            f"trainer.deterministic={str(task.deterministic).lower()}",
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
            # Its thread would run in every contender's rounds.
            "tracking.system_metrics=false",
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
        self.record.tracker = open_tracker(config, Store(config.tracking), folder, parts, [], None, None)
        stop = self.trainer.callbacks["stop"]
        assert isinstance(stop, StopAtUpdate)
        self.stop = stop
        self.flushes: list[float] = []

    def run(self, epochs: int) -> float:
        self.stop.update = self.trainer.progress.update + epochs * self.task.samples // self.task.batch
        self.trainer.stop_reason = None
        # The tracker flushes when its last flush is seconds ago: other contenders' seconds do not count.
        self.record.flush()
        wait_for(self.task.device)
        start = perf_counter()
        self.trainer.fit()
        wait_for(self.task.device)
        trained = perf_counter()
        self.record.flush()
        self.flushes.append(perf_counter() - trained)
        return perf_counter() - start

    def close(self) -> None:
        self.record.close("FINISHED")
        self._folder.cleanup()


CONTENDERS: dict[str, type[Contender]] = {
    kind.name: kind
    for kind in (HandWritten, SingleBatch, HandWrittenLoader, Accelerate, Fabric, LightningTrainer, Accumexp)
}


def lightning_accelerator(device: torch.device) -> str:
    return "gpu" if device.type == "cuda" else device.type


@contextlib.contextmanager
def peers_quiet(name: str) -> Iterator[None]:
    """Drops warnings and advice while one of the peers is at work."""
    if name == Accumexp.name:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def built(kind: type[Contender], task: Task) -> Contender:
    """A contender with the same initial weights and the same kernels as every other."""
    seed_everything(SEED, task.deterministic)
    with peers_quiet(kind.name):
        made = kind(task)
    for logger in ("lightning.pytorch", "lightning.fabric", "accelerate"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    return made


def timed(contender: Contender, epochs: int) -> float:
    """Seconds of one run, with the global switches that a peer may have turned put back before it."""
    task = contender.task
    seed_everything(SEED, task.deterministic)
    gc.collect()
    with peers_quiet(contender.name):
        return contender.run(epochs)


def first_gradient(contender: Contender) -> list[Tensor]:
    """The gradient of the first update: what momentum starts from, whenever `.grad` is zeroed."""
    state = contender.optimizer.state
    return [state[p]["momentum_buffer"].cpu().clone() for p in contender.model.parameters()]


def saved_bytes(contender: Contender) -> int:
    """Peak bytes saved for backward in one update, without parameters and images."""
    fed: list[Any] = []  # alive to the end, or an activation could get a batch's address
    with measure_activations(contender.model, []) as saved:

        def exclude(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            fed.append(inputs)
            saved.exclude(inputs)

        handle = contender.model.register_forward_pre_hook(exclude)
        timed(contender, 1)
        handle.remove()
    return saved.peak_bytes


def first_update(kind: type[Contender], task: Task) -> tuple[list[Tensor], int]:
    """The gradient of the first update, and the bytes that the second saves for backward."""
    contender = built(kind, task)
    timed(contender, 1)
    gradient = first_gradient(contender)
    peak = saved_bytes(contender)
    contender.close()
    return gradient, peak


def relative_error(name: str, gradient: list[Tensor], reference: list[Tensor]) -> float:
    """The largest of the parameters' errors, each relative to its gradient's norm.

    Raises:
        AssertionError: if it is above the tolerance.
    """
    pairs = zip(gradient, reference, strict=True)
    error = max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)
    assert error <= TOLERANCE, f"{name}: the gradient is off by {error:.1e} of its norm"
    return error


def measured(contenders: list[Contender], epochs: int, rounds: int) -> dict[str, list[float]]:
    """Seconds by contender, one a round; rounds run everyone in a new order."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        timed(contender, epochs)
    orders = random.Random(SEED)
    for _ in track(range(rounds), "rounds", console=console, transient=True):
        for contender in orders.sample(contenders, len(contenders)):
            seconds[contender.name].append(timed(contender, epochs))
    return seconds


def summary(seconds: list[float], reference: list[float], updates: int) -> dict[str, float]:
    ratios = [own / other for own, other in zip(seconds, reference, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "median_ms": 1e3 * statistics.median(seconds) / updates,
        "min_ms": 1e3 * min(seconds) / updates,
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
    }


def environment(device: torch.device) -> dict[str, Any]:
    found = {"torch": torch.__version__, "device": device_name(device), "threads": torch.get_num_threads()}
    found |= {"python": platform.python_version(), "cores": os.cpu_count()}
    for package in ("accelerate", "lightning", "mlflow"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def show(report: dict[str, Any]) -> None:
    table = Table("contender", title="one update", title_justify="left")
    for heading in ("median ms", "min ms", "ratio", "its quartiles", "saved MiB", "gradient off by"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in report["contenders"].items():
        quartiles = f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
        values = [f"{row['median_ms']:.3f}", f"{row['min_ms']:.3f}", f"{row['ratio']:.3f}", quartiles]
        table.add_row(name, *values, f"{row['saved_mib']:.3f}", f"{row['gradient_error']:.1e}")
    console.print(table)
    for part in ("settings", "environment"):
        line = ", ".join(f"{key} {value}" for key, value in report[part].items())
        console.print(f"{part}: {line}", highlight=False, soft_wrap=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.window", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, default=220, help="a round, rounded up to whole epochs")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, help="torch's own choice if left out")
    parser.add_argument("--deterministic", action="store_true", help="reproducible kernels for everyone")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="comma-separated names; %(default)s")
    asked = parser.parse_args()
    asked.only = [HandWritten.name, *(name for name in asked.only.split(",") if name != HandWritten.name)]
    if unknown := [name for name in asked.only if name not in CONTENDERS]:
        parser.error(f"--only: no contender {', '.join(unknown)}; {', '.join(CONTENDERS)}")
    if min(asked.rounds, asked.updates, asked.micro_batch, asked.steps, asked.threads or 1) < 1:
        parser.error("numbers are at least 1")
    return asked


def main() -> None:
    asked = arguments()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    # TF32 would make the gradients of two kernels differ more than the two definitions might.
    torch.backends.cudnn.allow_tf32 = False
    device, batch = pick_device(asked.device), asked.micro_batch * asked.steps
    task = Task(device, asked.micro_batch, asked.steps, asked.deterministic, batch)
    per_epoch = len(Digits(train=True)) // batch
    if not per_epoch:
        raise SystemExit(f"error: {batch} samples an update are more than there are")
    epochs = -(-asked.updates // per_epoch)
    whole = replace(task, samples=per_epoch * batch)
    reference: list[Tensor] = []
    checks: dict[str, tuple[float, int]] = {}
    contenders: list[Contender] = []
    skipped: dict[str, str] = {}
    for kind in map(CONTENDERS.__getitem__, asked.only):
        try:
            gradient, peak = first_update(kind, task)
            reference = reference or gradient  # the hand-written loop comes first
            checks[kind.name] = relative_error(kind.name, gradient, reference), peak
            contenders.append(built(kind, whole))
        except ModuleNotFoundError as error:
            skipped[kind.name] = f"{error.name} is not installed: pip install 'accumexp[bench]'"
            console.print(f"{kind.name} skipped: {skipped[kind.name]}", highlight=False, markup=False)
    seconds = measured(contenders, epochs, asked.rounds)
    updates = epochs * per_epoch
    rows: dict[str, dict[str, float]] = {}
    for contender in contenders:
        name = contender.name
        error, peak = checks[name]
        rows[name] = summary(seconds[name], seconds[HandWritten.name], updates)
        rows[name] |= {"saved_mib": peak / MIB, "gradient_error": error}
        if isinstance(contender, Accumexp):
            rows[name]["last_flush_ms"] = 1e3 * statistics.median(contender.flushes) / updates
        contender.close()
    settings = {"micro_batch": asked.micro_batch, "steps": asked.steps, "updates": updates}
    settings |= {"rounds": asked.rounds, "deterministic": asked.deterministic}
    report = {"environment": environment(device), "settings": settings, "contenders": rows}
    show(report)
    if asked.json:
        report |= {"skipped": skipped, "seconds": seconds}
        asked.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
