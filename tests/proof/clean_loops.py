"""Random configurations of right windows: the proof must certify every one of them.

`python -m tests.proof.clean_loops 1000` certifies configurations 0 to 999, each the same in every run, and
ends with the number of alarms; a second number is the first configuration, a third the number of ranks.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, StepLR

from accumexp.accum import (
    LossScale,
    OptimizerStep,
    Window,
    batch_size,
    data_parallel,
    map_tensors,
    rank_share,
    steps_for,
)
from accumexp.proof import Certificate, Scaling, certify

from ..support.ranks import on_ranks
from .clean_models import CLASSES, DRAWS, LENGTH, MODELS, TOKEN_MODELS, WORDS

Choose = Callable[[Sequence[Any]], Any]
Configuration = dict[str, Any]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p: Adam(p, lr=1e-2),
    "tiny adam": lambda p: Adam(p, lr=1e-3, eps=1e-15, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "two groups": lambda p: SGD(
        [{"params": p[::2]}, {"params": p[1::2], "lr": 0.01, "weight_decay": 0.1}], lr=0.1, momentum=0.9
    ),
}
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any] | None] = {
    "none": None,
    "cosine": lambda o: CosineAnnealingLR(o, 30),
    "step": lambda o: StepLR(o, 3, 0.5),
    "warm-up": lambda o: LambdaLR(o, lambda n: min(1.0, (n + 1) / 8)),
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp64": {"precision": torch.float64},
    "bf16 autocast": {"autocast": torch.bfloat16},
    "bf16 parameters": {"precision": torch.bfloat16},
    "fp16 loss-scaled": {"autocast": torch.float16, "loss_scale": Scaling(growth_interval=5)},
}
CLASS_LOSSES = (
    "cross entropy", "class weights", "ignored", "smoothing", "weights, ignored, smoothing",
    "probabilities", "nll", "sum", "none",
)  # fmt: skip
NUMBER_LOSSES = ("mse", "l1", "smooth l1", "bce", "mse sum", "mse none", "function", "sample weights")


def configuration(choose: Choose) -> Configuration:
    """One right configuration; `choose` picks one of several values."""
    model = choose([*MODELS, *TOKEN_MODELS])
    tokens = model in TOKEN_MODELS
    losses = [name for name in CLASS_LOSSES if not (tokens and name == "probabilities")]
    samples = choose((2, 3, 5, 7, 8, 12, 16, 17, 24, 31))
    # torch lacks LSTMs in low precision on some CPUs.
    precisions = list(PRECISIONS)[: 2 if model == "recurrent" else None]
    return {
        "model": model,
        "loss": choose(losses if tokens else [*losses, *NUMBER_LOSSES]),
        "samples": samples,
        "steps": choose([steps for steps in (1, 2, 3, 4, 5, 8, 11, 16) if steps <= samples]),
        "optimizer": choose(list(OPTIMIZERS)),
        "scheduler": choose(list(SCHEDULERS)),
        "clip_norm": choose((None, None, 0.05, 1.0, 1e4)),
        "precision": choose(precisions),
        "scale": choose((1.0, 1.0, 1.0, 1e-4, 30.0)),
        "seed": choose(range(1000)),
    }


class SampleWeights(nn.Module):
    """A loss as its two sums: squared errors, each sample with a weight of its own in the targets."""

    def weight(self, targets: Any) -> Tensor:
        return targets[1].sum()

    def total(self, outputs: Tensor, targets: Any) -> Tensor:
        return ((outputs - targets[0]).square().mean(1) * targets[1]).sum()


def absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.float() - targets).abs().mean()


def loss_of(name: str) -> Callable[..., Any]:
    weights = torch.tensor([0.3, 1.0, 2.5, 0.7])
    return {
        "cross entropy": lambda: nn.CrossEntropyLoss(),
        "class weights": lambda: nn.CrossEntropyLoss(weight=weights),
        "ignored": lambda: nn.CrossEntropyLoss(),
        "smoothing": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
        "weights, ignored, smoothing": lambda: nn.CrossEntropyLoss(
            weights, label_smoothing=0.2, ignore_index=2
        ),
        "probabilities": lambda: nn.CrossEntropyLoss(),
        "nll": lambda: nn.NLLLoss(),
        "sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
        "none": lambda: nn.CrossEntropyLoss(reduction="none"),
        "mse": lambda: nn.MSELoss(),
        "l1": lambda: nn.L1Loss(),
        "smooth l1": lambda: nn.SmoothL1Loss(),
        "bce": lambda: nn.BCEWithLogitsLoss(pos_weight=weights),
        "mse sum": lambda: nn.MSELoss(reduction="sum"),
        "mse none": lambda: nn.MSELoss(reduction="none"),
        "function": lambda: absolute,
        "sample weights": lambda: SampleWeights(),
    }[name]()


def batch_of(config: Configuration) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(config["seed"])
    count, name = config["samples"], config["loss"]
    if config["model"] in TOKEN_MODELS:
        inputs, shape = torch.randint(0, WORDS, (count, LENGTH), generator=generator), (count, LENGTH)
    else:
        inputs = config["scale"] * torch.randn(count, *MODELS[config["model"]].shape, generator=generator)
        shape = (count,)
    if name in ("mse", "l1", "smooth l1", "mse sum", "mse none", "function"):
        return inputs, torch.randn(count, CLASSES, generator=generator)
    if name == "bce":
        return inputs, torch.rand(count, CLASSES, generator=generator).round()
    if name == "sample weights":
        weights = torch.rand(count, generator=generator) + 0.1
        return inputs, (torch.randn(count, CLASSES, generator=generator), weights)
    if name == "probabilities":
        return inputs, torch.rand(count, CLASSES, generator=generator).softmax(1)
    targets = torch.randint(0, CLASSES, shape, generator=generator)
    if name == "ignored":
        ignored = torch.rand(shape, generator=generator) < 0.4
        ignored.view(-1)[0] = False
        targets = targets.masked_fill(ignored, -100)
    if name == "weights, ignored, smoothing":
        targets.view(-1)[0] = 1
    return inputs, targets


def loop_of(config: Configuration, loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loop of accumexp's own window and step, which any number of ranks may share."""
    made: dict[int, tuple[Any, ...]] = {}
    precision = PRECISIONS[config["precision"]]

    def train_window(model: Any, optimizer: Any, batch: Any, steps: int, schedule: Any = None) -> float:
        if id(model) not in made:
            scaling = precision.get("loss_scale")
            window = Window(
                model,
                loss,
                steps,
                autocast=precision.get("autocast"),
                fp32_buffers=config["precision"] == "bf16 parameters",
                loss_scale=scaling and LossScale(2.0**8, growth_interval=scaling.growth_interval),
            )
            # With the model, so that no other gets its id.
            made[id(model)] = model, window, OptimizerStep(window, optimizer, config["clip_norm"])
        _, window, step = made[id(model)]
        samples = batch_size(batch)
        steps = steps_for(samples, config["samples"], steps)
        ranks = window.sync.ranks
        if ranks.size > 1:
            share = rank_share(samples, steps, ranks.rank, ranks.size)
            rows = [number for part in share for number in part]
            samples = len(rows)
            batch = tuple(map_tensors(lambda t: t[rows or [0]], part) for part in batch)
        optimizer.zero_grad(set_to_none=not window.sync.keeps_gradients)
        result = window.backward(*batch, steps=steps, samples=samples)
        step()
        if schedule is not None:
            schedule.step()
        return result.loss.item()

    return train_window


def certified(config: Configuration, updates: int = 6) -> Certificate:
    torch.manual_seed(config["seed"])
    name = config["model"]
    model = TOKEN_MODELS[name]() if name in TOKEN_MODELS else MODELS[name].make()
    if config["loss"] == "nll":
        model = nn.Sequential(model, nn.LogSoftmax(1))
    loss = loss_of(config["loss"])
    ranks = dist.is_initialized()
    return certify(
        loop_of(config, loss),
        model,
        loss,
        batch_of(config),
        config["steps"],
        optimizer=OPTIMIZERS[config["optimizer"]],
        scheduler=SCHEDULERS[config["scheduler"]],
        clip_norm=config["clip_norm"],
        prepare=data_parallel if ranks else None,
        updates=updates,
        **PRECISIONS[config["precision"]],
    )


def alarm(config: Configuration, certificate: Certificate) -> str:
    """The failed checks and causes of a right configuration; "" if it is proved."""
    draws = config["model"] in DRAWS and certificate.subject["steps"] * certificate.subject["ranks"] > 1
    idle = any(cause.source == "clipping, which never acted" for cause in certificate.causes)
    right = "proved up to" if draws or idle else "proved"
    if certificate.verdict == right:
        return ""
    failed = "; ".join(f"{c.name}: {c.figure:.3g} > {c.bound:.3g} ({c.detail})" for c in certificate.failed)
    return f"{certificate}\n  failed: {failed}"


def numbered(number: int) -> Configuration:
    """Configuration `number`, the same in every run."""
    return configuration(Random(number).choice)


def numbers(first: int, count: int) -> list[tuple[int, str]]:
    """(number, alarm) of the false alarms among `count` configurations."""
    alarms = []
    begun = time.perf_counter()
    loud = not dist.is_initialized() or dist.get_rank() == 0
    for number in range(first, first + count):
        config = numbered(number)
        if dist.is_initialized() and config["model"] == "unused":
            config["model"] = "frozen"  # a wrapper of several ranks wants a gradient of every parameter
        if dist.is_initialized() and config["samples"] < config["steps"] * dist.get_world_size():
            config["samples"] = config["steps"] * dist.get_world_size() + 1
        try:
            trouble = alarm(config, certified(config))
        except Exception:
            trouble = traceback.format_exc()
        if trouble:
            alarms.append((number, f"{config}\n  {trouble}"))
            if loud:
                print(f"alarm {number}: {alarms[-1][1]}", flush=True)
        if loud and (number - first) % 50 == 49:
            seconds = time.perf_counter() - begun
            print(f"{number - first + 1}/{count}, {len(alarms)} alarms, {seconds:.0f} s", flush=True)
    return alarms


def main(count: int, first: int = 0, size: int = 1) -> int:
    torch.set_num_threads(1)
    if size == 1:
        alarms = numbers(first, count)
    else:
        with TemporaryDirectory() as folder:
            alarms = on_ranks(size, Path(folder), numbers, first, count, seconds=7200)[0]
    print(f"alarms: {len(alarms)} of {count}")
    return int(bool(alarms))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:] or ["1000"])))
