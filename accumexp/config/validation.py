"""Checks of a composed configuration: ranges, and combinations of keys that exclude each other."""

from __future__ import annotations

from ..errors import UsageError
from .accum import LossScaling, Strategy, check_accum
from .report import check_report
from .schema import Config, Precision
from .sizes import AUTO, at_least, batch_sizes, processes


def check(config: Config) -> Config:
    """`config` with ranks, precision and batch sizes filled in, or a `UsageError` that names the key."""
    data, accum, trainer = config.data, config.accum, config.trainer
    standalone = accum.strategy is Strategy.standalone
    accum.processes = processes(accum.processes, standalone, config.device)
    data.batch_size, accum.steps, accum.micro_batch_size = batch_sizes(
        data.batch_size, accum.steps, accum.micro_batch_size, accum.processes
    )
    scaled = accum.loss_scale is not LossScaling.none
    if config.precision is None:
        config.precision = Precision.fp16 if scaled else Precision.fp32
    at_least(1, "data.eval_batch_size", data.eval_batch_size)
    at_least(0, "data.workers", data.workers)
    at_least(1, "data.prefetch", data.prefetch)
    at_least(1, "trainer.epochs", trainer.epochs)
    at_least(1, "trainer.max_updates", trainer.max_updates)
    at_least(1, "trainer.log_every", trainer.log_every)
    at_least(1, "trainer.eval_every", trainer.eval_every)
    at_least(1, "trainer.threads", trainer.threads)
    at_least(1, "replicas", config.replicas)
    at_least(1, "proof.updates", config.proof.updates)
    at_least(1, "tracking.flush_points", config.tracking.flush_points)
    if not 0 <= data.eval_fraction < 1:
        raise UsageError(f"data.eval_fraction={data.eval_fraction}: a fraction from 0 to below 1")
    if trainer.clip_norm is not None and not trainer.clip_norm > 0:
        raise UsageError(f"trainer.clip_norm={trainer.clip_norm}: a norm above 0, or null for no clipping")
    if trainer.clip_value is not None and not 0 < trainer.clip_value < float("inf"):
        raise UsageError(f"trainer.clip_value={trainer.clip_value}: a value above 0, or null for no clipping")
    if config.mode not in ("max", "min"):
        raise UsageError(f"mode={config.mode}: max or min")
    if config.precision is Precision.fp16 and not scaled:
        raise UsageError("precision=fp16: needs a loss scale, accum=loss_scaled or accum.loss_scale=dynamic")
    if config.param_precision is Precision.fp16:
        raise UsageError("param_precision=fp16: a gradient of 10 bits cannot be unscaled; use fp32 or bf16")
    check_accum(accum)
    if trainer.graph and not standalone:
        raise UsageError(
            f"trainer.graph=true: a graph is recorded of one process, not of accum={accum.strategy.name}"
        )
    if trainer.graph and accum.fp32_buffers:
        raise UsageError("trainer.graph=true: not with accum.fp32_buffers=true, which moves gradients about")
    if trainer.graph and accum.recover:
        raise UsageError("accum.recover=true: not with trainer.graph=true, which records windows as they are")
    if config.replicas > 1 and not standalone:
        raise UsageError(f"replicas={config.replicas}: trains them in one process, take accum=standalone")
    if config.replicas > 1 and config.prove:
        raise UsageError(
            f"replicas={config.replicas}: a certificate is of one run, make it with python -m accumexp.prove"
        )
    for key, given in (
        ("trainer.graph=true", trainer.graph),
        ("trainer.compile=true", trainer.compile),
        (f"accum.steps={AUTO}", accum.steps == AUTO),
    ):
        if config.replicas > 1 and given:
            raise UsageError(f"{key}: is of one run, leave it out or replicas={config.replicas}")
    check_report(config.report)
    for group in ("model", "loss", "optimizer", "scheduler"):
        if "_target_" not in getattr(config, group):
            raise UsageError(f"{group}: names no class, give {group}._target_=package.Class")
    return config
