"""Checks of a composed configuration: ranges, and combinations of keys that exclude each other."""

from __future__ import annotations

from ..errors import UsageError
from .accum import LossScaling, Strategy, check_accum
from .ranges import check_ranges
from .schema import Config, Precision
from .sizes import AUTO, batch_sizes, processes


def check(config: Config) -> Config:
    """`config` with ranks, precision and batch sizes filled in, or a `UsageError` that names the key."""
    check_ranges(config)
    data, accum, trainer = config.data, config.accum, config.trainer
    standalone = accum.strategy is Strategy.standalone
    accum.processes = processes(accum.processes, standalone, config.device)
    data.batch_size, accum.steps, accum.micro_batch_size = batch_sizes(
        data.batch_size, accum.steps, accum.micro_batch_size, accum.processes
    )
    scaled = accum.loss_scale is not LossScaling.none
    if config.precision is None:
        config.precision = Precision.fp16 if scaled else Precision.fp32
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
    for group in ("model", "loss", "optimizer", "scheduler"):
        if "_target_" not in getattr(config, group):
            raise UsageError(f"{group}: names no class, give {group}._target_=package.Class")
    return config
