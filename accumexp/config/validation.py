"""Checks of a composed configuration: ranges, and combinations of keys that exclude each other."""

from __future__ import annotations

from ..errors import UsageError
from .ranges import check_numbers, check_ranges
from .schema import AccumConfig, Config, LateWeights, LossScaling, Precision, Reduction, Strategy
from .sizes import AUTO, batch_sizes, in_bytes, processes


def complete(config: Config) -> Config:
    """Checks `config`, and fills in its ranks, precision and batch sizes.

    Raises:
        UsageError: naming the key of a bad value.
    """
    check_ranges(config)
    for group in ("model", "loss", "optimizer", "scheduler", "callbacks", "metrics"):
        check_numbers(getattr(config, group), group)
    if config.trust:
        raise UsageError(
            f"trust={config.trust}: is of resume=, whose configuration comes from a checkpoint; a new run's "
            "is your own, leave it out"
        )
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
    _check_accum(accum)
    if trainer.graph and not standalone:
        raise UsageError(
            f"trainer.graph=true: a graph is recorded of one process, not of accum={accum.strategy.name}"
        )
    if trainer.graph and accum.fp32_buffers:
        raise UsageError("trainer.graph=true: not with accum.fp32_buffers=true, which moves gradients about")
    if trainer.graph and accum.recover:
        raise UsageError("accum.recover=true: not with trainer.graph=true, which records windows as they are")
    if config.replicas > 1:
        replicas = f"replicas={config.replicas}"
        if not standalone:
            raise UsageError(f"{replicas}: trains them in one process, take accum=standalone")
        if config.prove:
            raise UsageError(
                f"{replicas}: a certificate is of one run, make it with python -m accumexp.prove"
            )
        single = {"trainer.graph=true": trainer.graph, "trainer.compile=true": trainer.compile}
        for key, given in {**single, f"accum.steps={AUTO}": accum.steps == AUTO}.items():
            if given:
                raise UsageError(f"{key}: is of one run, leave it out or {replicas}")
    for group in ("model", "loss", "optimizer", "scheduler"):
        if "_target_" not in getattr(config, group):
            raise UsageError(f"{group}: names no class, give {group}._target_=package.Class")
    return config


def _check_accum(accum: AccumConfig) -> None:
    """Raises a `UsageError` for settings that exclude each other."""
    sharded, summed, automatic = (
        accum.strategy is Strategy.fsdp,
        accum.reduction is Reduction.sum,
        accum.steps == AUTO,
    )
    if sharded and accum.fp32_buffers:
        raise UsageError("accum.fp32_buffers=true: not with accum=fsdp, which keeps gradients in shards")
    if accum.late_weights is LateWeights.gradients and (sharded or accum.fp32_buffers):
        other = "accum=fsdp" if sharded else "accum.fp32_buffers=true"
        raise UsageError(f"accum.late_weights=gradients: not with {other}; take first_pass")
    if accum.reduce_every_micro_batch and not sharded:
        raise UsageError("accum.reduce_every_micro_batch=true: only accum=fsdp has shards to reduce to")
    if accum.recover and sharded:
        raise UsageError(
            "accum.recover=true: not with accum=fsdp, whose every forward waits for all ranks, so that none "
            "can go back alone"
        )
    if accum.recover and summed:
        raise UsageError(
            "accum.recover=true: not with accum.reduction=sum, whose update grows with the micro-batches"
        )
    if accum.memory_limit is not None:
        in_bytes("accum.memory_limit", accum.memory_limit)
    if automatic and sharded:
        raise UsageError(
            "accum.steps=auto: a rank cannot try a model that accum=fsdp holds in shards by itself, give "
            "accum.steps or accum.micro_batch_size"
        )
    if automatic and summed:
        raise UsageError(
            "accum.steps=auto: not with accum.reduction=sum, whose update grows with the micro-batches and "
            "would be that of the free memory"
        )
