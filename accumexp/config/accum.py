"""The configuration of `accum`: how an update's batch becomes a window. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..errors import UsageError
from .ranges import count, number
from .sizes import AUTO, in_bytes

# Below the largest number of fp32, the dtype of the scale.
LARGEST_SCALE = 2.0**127


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
    # any two give the third. steps=auto: the fewest whose micro-batch fits the memory.
    steps: int | str | None = None
    micro_batch_size: int | None = count(None)
    # What steps=auto keeps the tensors of a rank's device below: bytes, or 2GiB, 500MiB, 24GB.
    # Null: the device's free memory.
    memory_limit: int | str | None = None
    reduction: Reduction = Reduction.mean
    # Accumulate the gradients of bf16 parameters in fp32: one more fp32 buffer per such parameter.
    fp32_buffers: bool = False
    # Ranks. Null: as many as torchrun or the cluster started; else one a GPU, or two without a GPU.
    processes: int | None = count(None, at_most=65536)
    # With it, a window in which any micro-batch on any rank overflows is skipped on all ranks.
    loss_scale: LossScaling = LossScaling.none
    init_scale: float = number(65536.0, above=0, below=LARGEST_SCALE)
    growth_factor: float = number(2.0, above=1, below=LARGEST_SCALE)
    backoff_factor: float = number(0.5, above=0, below=1)
    # Updates without an overflow after which a dynamic scale grows.
    growth_interval: int = count(2000)
    min_scale: float = number(1.0, above=0, below=LARGEST_SCALE)
    # ddp: look for parameters that a forward pass did not use. Costs a walk of the graph a window.
    find_unused_parameters: bool = False
    # fsdp: reduce-scatter in every micro-batch, so that no unsharded gradient is kept between them.
    reduce_every_micro_batch: bool = False
    # Out of memory splits the window finer on all ranks, and all that follow. Null: but with fsdp, and but
    # with reduction=sum, whose update grows with the steps.
    recover: bool | None = None

    @property
    def recovers(self) -> bool:
        if self.recover is not None:
            return self.recover
        return self.strategy is not Strategy.fsdp and self.reduction is Reduction.mean


def check_accum(accum: AccumConfig) -> None:
    """Refuses what goes together with nothing, or not with the strategy.

    Raises:
        UsageError: naming the key.
    """
    if accum.strategy is Strategy.fsdp and accum.fp32_buffers:
        raise UsageError("accum.fp32_buffers=true: not with accum=fsdp, which keeps gradients in shards")
    if accum.reduce_every_micro_batch and accum.strategy is not Strategy.fsdp:
        raise UsageError("accum.reduce_every_micro_batch=true: only accum=fsdp has shards to reduce to")
    if accum.recover and accum.strategy is Strategy.fsdp:
        raise UsageError(
            "accum.recover=true: not with accum=fsdp, whose every forward waits for all ranks, so that none "
            "can go back alone"
        )
    if accum.recover and accum.reduction is Reduction.sum:
        raise UsageError(
            "accum.recover=true: not with accum.reduction=sum, whose update grows with the micro-batches"
        )
    if accum.memory_limit is not None:
        in_bytes("accum.memory_limit", accum.memory_limit)
    if accum.steps == AUTO and accum.strategy is Strategy.fsdp:
        raise UsageError(
            "accum.steps=auto: a rank cannot try a model that accum=fsdp holds in shards by itself, give "
            "accum.steps or accum.micro_batch_size"
        )
    if accum.steps == AUTO and accum.reduction is Reduction.sum:
        raise UsageError(
            "accum.steps=auto: not with accum.reduction=sum, whose update grows with the micro-batches and "
            "would be that of the free memory"
        )
