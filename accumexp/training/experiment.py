"""From a configuration to the objects it names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from ..accum import (
    GraphedStep,
    LossScale,
    Ranks,
    Window,
    WindowLoss,
    data_parallel,
    fully_sharded,
    window_loss,
)
from ..config.instantiate import build
from ..config.schema import AccumConfig, Config, LossScaling, Precision, Strategy
from ..data import Placement, Share, Splits, build_splits
from ..environment.device import pick_device
from ..environment.random_state import derive_seed, seed_everything
from ..environment.ranks import RankInfo, device_of, first_here
from ..errors import UsageError
from ..sweeps.cores import cores
from .callbacks import EMA, Callback
from .evaluation import Evaluator
from .graphs import graphs, say_what_is_not
from .progress import MetricsSink, total_updates, updates_between_reads
from .schedules import may_be_fused
from .trainer import Trainer

ALONE = RankInfo()

DTYPES = {
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.fp64: torch.float64,
}


@dataclass(frozen=True)
class Parts:
    """What training and evaluation share.

    Attributes:
        criterion: the loss as the configuration names it; `loss` is the same as a window takes it.
    """

    device: torch.device
    model: nn.Module
    criterion: Any
    loss: WindowLoss
    splits: Splits
    evaluator: Evaluator
    autocast: torch.dtype | None


def placement(config: Config, rank_info: RankInfo = ALONE) -> Placement:
    """The device and the dtype of what is trained."""
    dtype = DTYPES[config.param_precision or _parameter_precision(config.precision)]
    return Placement(pick_device(device_of(config.device, rank_info)), dtype)


def build_parts(config: Config, rank_info: RankInfo = ALONE, splits: Splits | None = None) -> Parts:
    """Model, loss, data and metrics, on the device and in the precision of `config`.

    Seeds all generators first, so that the model's initial weights are a function of `seed`, on all ranks
    alike; what is drawn later differs from rank to rank.

    Args:
        splits: the data, where it has been built already.

    Raises:
        UsageError: naming the key that cannot be built.
    """
    place = placement(config, rank_info)
    device, dtype = place.device, place.dtype
    threads = config.trainer.threads
    if threads is None and rank_info.size > 1:
        threads = max(1, cores() // rank_info.local_size)
    if threads:
        torch.set_num_threads(threads)
    seed_everything(config.seed, config.trainer.deterministic)
    autocast = _autocast(config.precision, dtype)
    ranks = Ranks() if rank_info.size > 1 else Ranks(alone=True)
    # Data before the model: what is wrong with it is then said first, and by name.
    share = Share(rank_info.rank, rank_info.size, cast(int, config.accum.steps))
    if splits is None:
        with first_here(rank_info):
            splits = build_splits(config.data, config.seed, place, share)
    seed_everything(config.seed, config.trainer.deterministic)
    model = build_model(config)
    criterion = build(config.loss, "loss")
    if isinstance(criterion, nn.Module):
        criterion = criterion.to(device, dtype)
    loss = window_loss(criterion)
    evaluator = Evaluator(loss, build_metrics(config, device), autocast, ranks)
    model = model.to(device, dtype)
    if rank_info.rank:
        seed_everything(derive_seed("rank", config.seed, rank_info.rank), config.trainer.deterministic)
    return Parts(device, model, criterion, loss, splits, evaluator, autocast)


def build_model(config: Config) -> nn.Module:
    """The model, where and as what its class makes it.

    Raises:
        UsageError: naming the key that cannot be built.
    """
    cut = {"window_steps": config.accum.steps, "micro_batch_size": config.accum.micro_batch_size}
    model = build(config.model, "model", **cut)
    if not isinstance(model, nn.Module):
        made = f"{config.model['_target_']} made a {type(model).__name__}"
        raise UsageError(f"model: {made}, a torch.nn.Module is needed")
    return model


def build_metrics(config: Config, device: torch.device) -> MetricCollection:
    """The torchmetrics of `metrics`, by their names there."""
    metrics: dict[str, Metric | MetricCollection] = {}
    for name, node in config.metrics.items():
        metric = build(node, f"metrics.{name}")
        if not isinstance(metric, Metric):
            raise UsageError(f"metrics.{name}: a torchmetrics Metric is needed, not {type(metric).__name__}")
        metrics[name] = metric
    return MetricCollection(metrics).to(device)


def build_window(accum: AccumConfig, model: nn.Module, parts: Parts) -> Window:
    """The window over `model`, prepared for its ranks, with the loss and precision of `parts`."""
    return Window(
        model,
        parts.loss,
        cast(int, accum.steps),
        reduction=accum.reduction.value,
        autocast=parts.autocast,
        fp32_buffers=accum.fp32_buffers,
        loss_scale=build_loss_scale(accum, parts.device),
        reduce_every_micro_batch=accum.reduce_every_micro_batch,
        local_loss=True,
    )


def build_optimizer(
    config: Config, parameters: list[nn.Parameter], model: nn.Module | None = None
) -> Optimizer:
    """The optimizer over `parameters` of `model`: fused, where torch has a kernel for it and nobody chose."""
    if may_be_fused(config.optimizer, parameters, model.modules() if model else ()):
        recorded = {"capturable": True} if config.trainer.graph else {}
        return build(config.optimizer, "optimizer", parameters, fused=True, **recorded)
    return build(config.optimizer, "optimizer", parameters)


def build_scheduler(config: Config, optimizer: Optimizer, updates: int) -> Any:
    """The schedule of a run of `updates`."""
    return build(config.scheduler, "scheduler", optimizer, total_updates=updates)


def updates_of(config: Config, parts: Parts) -> int:
    """Updates in the run."""
    return total_updates(len(parts.splits.train), config.trainer.epochs, config.trainer.max_updates)


def build_trainer(
    config: Config, parts: Parts, metrics_sink: MetricsSink, updates: int | None = None
) -> Trainer:
    """The loop over `parts` that `config` describes.

    `updates` is the length of the schedule, where it is not that of the run.

    Raises:
        UsageError: naming the key that cannot be built.
    """
    if config.trainer.compile:
        parts.model.compile()
    window = build_window(config.accum, for_ranks(config.accum, parts.model, parts.device), parts)
    loop = config.trainer
    optimizer = build_optimizer(config, list(parts.model.parameters()), parts.model)
    scheduler = build_scheduler(config, optimizer, updates or updates_of(config, parts))
    trainer = Trainer(
        window,
        optimizer,
        scheduler,
        parts.splits,
        parts.evaluator,
        build_metrics(config, parts.device),
        metrics_sink,
        build_callbacks(config),
        device=parts.device,
        epochs=loop.epochs,
        max_updates=loop.max_updates,
        log_every=loop.log_every or updates_between_reads(updates_of(config, parts)),
        eval_every=loop.eval_every,
        clip_norm=loop.clip_norm,
        check_finite=loop.check_finite,
        recover=config.accum.recovers and not loop.graph,
        record=graphs(window, parts.splits.train, parts.device) if loop.graph else None,
    )
    if isinstance(trainer.step, GraphedStep):
        say_what_is_not(trainer.step.step)
    for name, callback in trainer.callbacks.items():
        callback.check(trainer, f"callbacks.{name}")
    return trainer


def build_loss_scale(accum: AccumConfig, device: torch.device) -> LossScale | None:
    """The loss scale of `accum`, or None.

    Raises:
        UsageError: naming the setting that cannot work.
    """
    if accum.loss_scale is LossScaling.none:
        return None
    try:
        return LossScale(
            accum.init_scale,
            dynamic=accum.loss_scale is LossScaling.dynamic,
            growth_factor=accum.growth_factor,
            backoff_factor=accum.backoff_factor,
            growth_interval=accum.growth_interval,
            min_scale=accum.min_scale,
            device=device,
        )
    except ValueError as error:
        raise UsageError(f"accum.{error}") from error


def for_ranks(accum: AccumConfig, model: nn.Module, device: torch.device) -> nn.Module:
    """`model` as the strategy wants it."""
    if accum.strategy is Strategy.ddp:
        return data_parallel(model, find_unused_parameters=accum.find_unused_parameters)
    if accum.strategy is Strategy.fsdp:
        try:
            return fully_sharded(model, device)
        except ValueError as error:  # parameters that two blocks share
            raise UsageError(f"model: accum=fsdp cannot cut it into blocks: {error}") from error
    return model


def _autocast(precision: Precision | None, parameters: torch.dtype) -> torch.dtype | None:
    if precision not in (Precision.bf16, Precision.fp16) or parameters is DTYPES[precision]:
        return None
    return DTYPES[precision]


def build_callbacks(config: Config) -> dict[str, Callback]:
    known = {"loss", *config.metrics}
    if config.monitor.removeprefix("eval/").removeprefix("ema_") not in known or "/" not in config.monitor:
        choices = ", ".join(f"eval/{name}" for name in sorted(known))
        raise UsageError(f"monitor={config.monitor}: this run evaluates {choices}")
    callbacks: dict[str, Any] = {}
    for name, node in config.callbacks.items():
        if node is None:
            continue
        callbacks[name] = build(node, f"callbacks.{name}")
        if isinstance(callbacks[name], EMA) and config.accum.strategy is Strategy.fsdp:
            raise UsageError(
                f"callbacks.{name}: keeps a second whole model, which accum=fsdp has no room for"
            )
        if not isinstance(callbacks[name], Callback):
            raise UsageError(f"callbacks.{name}: {node['_target_']} is no accumexp.callbacks.Callback")
    return callbacks


def _parameter_precision(precision: Precision | None) -> Precision:
    return Precision.fp64 if precision is Precision.fp64 else Precision.fp32
