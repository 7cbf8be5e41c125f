"""How the gradients of several ranks become one: never, once a window, or once a micro-batch.

A window adds sums, so ranks must add too. `data_parallel` and `fully_sharded` prepare a model that way;
a model wrapped by other hands averages, as torch does by default, and its window makes up for it.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from .ranks import ALONE, Ranks

NOTHING = nullcontext()
SUMS = "sums_gradients"


class Sync:
    """One process: there is nothing to synchronise.

    Attributes:
        module: the model itself, without what wraps it.
        forward: what is called.
        ranks: the processes that share the window.
        factor: what a gradient must be multiplied by beforehand to be a sum over the ranks afterwards.
        keeps_gradients: zero `.grad` in place between windows; it lives in the buffers of the collective.
        sharded: parameters and gradients are spread over the ranks.
    """

    keeps_gradients = False
    sharded = False

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self.forward = model
        self.ranks = ALONE
        self.factor = 1

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch, the `last` of its window or not."""
        return NOTHING

    def begin_without_sync(self) -> None:
        """Before a window in whose micro-batches no rank waits for another: `reduce_gradients` ends it."""

    def reduce_gradients(self) -> None:
        """Adds the gradients that a window has left on each rank over the ranks."""

    def gradients(self) -> list[Tensor]:
        """The gradients that this process holds, as plain tensors that share their memory."""
        return [plain(p.grad) for p in self.module.parameters() if p.grad is not None]

    def norm(self) -> Tensor:
        """The 2-norm of the whole gradient, shape ()."""
        own = get_total_norm(self.gradients())
        return self.ranks.sum(own.square()).sqrt() if self.sharded else own

    def share_buffers(self, module: nn.Module | None = None) -> None:
        """Gives every rank the first one's buffers (BatchNorm's statistics), as the next window will.

        Those of `module` instead of the model's, where it is given.
        """
        for buffer in (module or self.module).buffers() if self.ranks.size > 1 else ():
            dist.broadcast(plain(buffer), group=self.ranks.group, group_src=0)

    def overflow(self) -> Tensor:
        """Whether the gradient has an inf or nan anywhere, on any rank; bool of shape ().

        Addition keeps both, so this sees what any micro-batch of the window produced. After an
        all-reduce every rank sees it; shards have to ask each other.
        """
        held = [gradient for gradient in self.gradients() if gradient.numel()]  # a shard may be empty
        device = next(self.module.parameters()).device
        largest = get_total_norm(held, norm_type=math.inf) if held else torch.zeros((), device=device)
        found = largest.isfinite().logical_not()
        return self.ranks.any(found) if self.sharded else found


class DataParallelSync(Sync):
    """DistributedDataParallel: one all-reduce a bucket, in the backward of the window's last micro-batch."""

    keeps_gradients = True

    def __init__(self, model: DistributedDataParallel) -> None:
        super().__init__(model)
        self.wrapper = model
        self.module = model.module
        self.ranks = Ranks(model.process_group)
        self.factor = 1 if getattr(model, SUMS, False) else self.ranks.size

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        return NOTHING if last else self.wrapper.no_sync()

    def begin_without_sync(self) -> None:
        # What DDP's forward would do with the other ranks at some time in the window. Not every window ends
        # in `reduce_gradients`: with fp32 buffers, none does.
        self.wrapper.require_forward_param_sync = True
        self.wrapper.reducer._rebuild_buckets()
        if self.wrapper.will_sync_module_buffers():
            self.wrapper._sync_buffers()
        self.wrapper.require_forward_param_sync = False

    def reduce_gradients(self) -> None:
        """DDP's own reduction, bucket by bucket and in its memory, in a backward that adds nothing."""
        held = [p for p in self.module.parameters() if p.requires_grad and p.grad is not None]
        nothing = _Nothing.apply(*held)
        reducer = self.wrapper.reducer
        reducer.prepare_for_forward()
        # What is not reached from here was not used on this rank, which DDP must know or else refuses.
        reducer.prepare_for_backward([nothing] if self.wrapper.find_unused_parameters else [])
        nothing.backward()
        self.wrapper.require_forward_param_sync = True


class _Nothing(torch.autograd.Function):
    """A function of parameters whose backward adds -0.0 to each gradient, which changes not even its sign."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        zeros: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        found: list[Tensor | None] = []
        for p in ctx.parameters:
            kind = p.dtype, p.device
            if kind not in zeros:
                zeros[kind] = p.new_full((), -0.0)
            # A dense gradient would make a sparse one dense.
            found.append(None if p.grad.is_sparse else zeros[kind].expand_as(p))
        return tuple(found)


class FullyShardedSync(Sync):
    """`fully_shard`: a reduce-scatter for each sharded module, once a window or once a micro-batch."""

    sharded = True

    def __init__(self, model: nn.Module, reduce_every_micro_batch: bool) -> None:
        super().__init__(model)
        self.wrapper: Any = model
        self.every = reduce_every_micro_batch
        parameters: Any = model.parameters()
        mesh = next(p.device_mesh for p in parameters if hasattr(p, "device_mesh"))
        if mesh.ndim != 1:
            raise ValueError(f"a model sharded over one dimension is needed, not over a mesh of {mesh.ndim}")
        self.ranks = Ranks(mesh.get_group())
        self.factor = 1 if getattr(model, SUMS, False) else self.ranks.size

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        # Every backward is left marked as the last: otherwise torch keeps the whole gradient of the block
        # it reduced last, and gathers one block for nothing.
        self.wrapper.set_requires_gradient_sync(last or self.every)
        return NOTHING


def sync_of(model: nn.Module, reduce_every_micro_batch: bool = False) -> Sync:
    """How the gradients of `model` are synchronised, by what it is wrapped in."""
    if isinstance(model, DistributedDataParallel):
        return DataParallelSync(model)
    # By its method, not its class: importing torch.distributed.fsdp takes as long as half of torch.
    if hasattr(model, "set_requires_gradient_sync"):
        return FullyShardedSync(model, reduce_every_micro_batch)
    return Sync(model)


def data_parallel(
    model: nn.Module, *, find_unused_parameters: bool = False, group: dist.ProcessGroup | None = None
) -> DistributedDataParallel:
    """`model` in a DistributedDataParallel that adds gradients over the ranks, in their own memory.

    Adding instead of averaging leaves every rank with the values that one process would have: an fp16
    backward overflows where the larger batch's does, at any number of ranks. It is made for `Window`: in a
    loop of other hands, every backward outside `no_sync` adds what was accumulated before once more.
    """
    wrapped = DistributedDataParallel(
        model,
        process_group=group,
        gradient_as_bucket_view=True,
        find_unused_parameters=find_unused_parameters,
    )
    wrapped.register_comm_hook(wrapped.process_group, _add)
    setattr(wrapped, SUMS, True)
    return wrapped


def fully_sharded(model: nn.Module, device: torch.device, *, group: dist.ProcessGroup | None = None) -> Any:
    """`model` with its parameters spread over the ranks, each block for itself, gradients added.

    A block is a direct child of the model, or an item of a direct child that is a list of layers. While
    one block computes, the others exist only in shards.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group or _world(), device.type)
    blocks = [
        item
        for child in model.children()
        for item in _items(child)
        if any(p.requires_grad for p in item.parameters())
    ]
    for module in [*blocks, model]:
        sharded = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    setattr(model, SUMS, True)
    return model


def _items(child: nn.Module) -> list[nn.Module]:
    return list(child.children()) if isinstance(child, _LISTS) else [child]


_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def plain(tensor: Tensor) -> Tensor:
    """This process's part of `tensor`: its shard, or all of it."""
    to_local = getattr(tensor, "to_local", None)  # of a DTensor
    return tensor if to_local is None else to_local()


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is not initialised"
    return world


def _add(group: Any, bucket):  # DDP refuses a hook whose annotations are strings, as they are here
    """DDP's communication hook: one all-reduce of the bucket, added and not averaged."""
    work: Any = dist.all_reduce(bucket.buffer(), dist.ReduceOp.SUM, group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
