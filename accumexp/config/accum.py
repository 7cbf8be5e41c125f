"""The configuration of `accum`: how an update's batch becomes a window. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..errors import UsageError
from .sizes import AUTO, at_least, in_bytes


class Reduction(Enum):
    mean = "mean"
    sum = "sum"


class Strategy(Enum):
    """standalone is one process; ddp replicates the model in every rank, fsdp spreads it over them."""

    standalone = "standalone"
    ddp = "ddp"
    fsdp = "fsdp"


class LossScaling(Enum):
    none = "none"
    static = "static"
    dynamic = "dynamic"


@dataclass
class AccumConfig:
    """How one update's batch becomes a window."""

    strategy: Strategy = Strategy.standalone
    # Micro-batches in a window and samples in a micro-batch; of these two and data.batch_size,
    # any two give the third. steps=auto: the fewest with a micro-batch that fits in memory.
    steps: int | str | None = None
    micro_batch_size: int | None = None
    # Limit of the tensors on a rank's device for steps=auto: bytes, or 2GiB, 500MiB, 24GB. Null: free memory.
    memory_limit: int | str | None = None
    reduction: Reduction = Reduction.mean
    # Accumulate the gradients of bf16 parameters in fp32: one more fp32 buffer per such parameter.
    fp32_buffers: bool = False
    # Ranks. Null: as many as torchrun or the cluster started; else one per GPU, or two without a GPU.
    processes: int | None = None
    # With a loss scale, an overflow in any micro-batch on any rank skips the window on all ranks.
    loss_scale: LossScaling = LossScaling.none
    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    # Updates without an overflow after which a dynamic scale grows.
    growth_interval: int = 2000
    min_scale: float = 1.0
    # ddp: look for parameters that a forward pass did not use. Walks the graph once per window.
    find_unused_parameters: bool = False
    # fsdp: reduce-scatter in every micro-batch, so that no unsharded gradient is kept between them.
    reduce_every_micro_batch: bool = False
    # Out of memory splits this window and the following ones finer, on all ranks. Null: except with fsdp, and
    # with reduction=sum, whose update grows with the steps.
    recover: bool | None = None

    @property
    def recovers(self) -> bool:
        if self.recover is not None:
            return self.recover
        return self.strategy is not Strategy.fsdp and self.reduction is Reduction.mean


def check_accum(accum: AccumConfig) -> None:
    """Raises a `UsageError` for settings that exclude each other."""
    sharded, summed, automatic = (
        accum.strategy is Strategy.fsdp,
        accum.reduction is Reduction.sum,
        accum.steps == AUTO,
    )
    if sharded and accum.fp32_buffers:
        raise UsageError("accum.fp32_buffers=true: not with accum=fsdp, which keeps gradients in shards")
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
    at_least(1, "accum.growth_interval", accum.growth_interval)
