"""Synchronises the gradients of several ranks: never, once a window, or once a micro-batch.

Models wrapped by `data_parallel` and `fully_sharded` sum gradients over the ranks. Any other wrapper averages
them, torch's default, and the window multiplies by the number of ranks.
"""

from __future__ import annotations

import math
import re
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
LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class FrozenLater(RuntimeError):
    """A parameter began or ceased to train after DDP was made, outside of `Recovery`."""


class Sync:
    """A model on one process: nothing is synchronised. Base of the others.

    Attributes:
        module: the model without its wrapper.
        forward: the callable of the forward pass, with the wrapper.
        ranks: the processes that share the window.
        factor: the factor of the loss with which the reduced gradient is the sum over the ranks.
        keeps_gradients: whether `.grad` must be zeroed in place between windows, because it is a view of the
            collective's buffers.
        sharded: whether parameters and gradients are sharded over the ranks.
    """

    keeps_gradients = False
    sharded = False

    def __init__(self, model: nn.Module) -> None:
        self.module = model
        self.forward = model
        self.ranks = ALONE
        self.factor = 1

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """The context of a micro-batch's forward and backward; `last` is the window's last one."""
        return NOTHING

    def begin_without_sync(self) -> None:
        """Prepares a window whose micro-batches do not communicate; `reduce_gradients` ends it."""

    def watch_use(self) -> None:
        """Marks the state of all gradients, for `unused`, before the first micro-batch."""

    def unused(self) -> list[int]:
        """The indices of the trained parameters that no backward on this rank reached since `watch_use`."""
        return []

    def reduce_gradients(self, some_unused: bool = False) -> None:
        """Adds the ranks' gradients after a window whose micro-batches did not communicate.

        With `some_unused`, the same on all ranks, the gradient of a parameter that is `unused` on every rank
        is None afterwards, with which an optimizer skips it.
        """

    def gradients(self) -> list[Tensor]:
        """This process's gradients, or shards of them, as plain tensors that share their memory."""
        return [plain(p.grad) for p in self.module.parameters() if p.grad is not None]

    def norm(self) -> Tensor:
        """The 2-norm of the whole gradient, shape ()."""
        local = get_total_norm(self.gradients())
        return self.ranks.sum(local.square()).sqrt() if self.sharded else local

    def share_buffers(self, module: nn.Module | None = None) -> None:
        """Broadcasts the first rank's buffers of `module`, by default the model, as the next window does."""
        for buffer in (module or self.module).buffers() if self.ranks.size > 1 else ():
            dist.broadcast(plain(buffer), group=self.ranks.group, group_src=0)

    def overflow(self) -> Tensor:
        """Whether the gradient has an inf or nan on any rank; bool of shape ().

        Addition preserves both, so an overflow in any micro-batch is detected.
        """
        held = [gradient for gradient in self.gradients() if gradient.numel()]  # a shard may be empty
        device = next(self.module.parameters()).device
        largest = get_total_norm(held, norm_type=math.inf) if held else torch.zeros((), device=device)
        overflow = largest.isfinite().logical_not()
        return self.ranks.any(overflow) if self.sharded else overflow


class DataParallelSync(Sync):
    """DistributedDataParallel: one all-reduce per bucket, in the backward of the last micro-batch."""

    def __init__(self, model: DistributedDataParallel) -> None:
        super().__init__(model)
        self.wrapper = model
        # A parameter that no rank used keeps the gradient None, with which an optimizer skips it.
        self.keeps_gradients = not model.find_unused_parameters
        self.module = model.module
        # DDP reduces those that train when it is made, whatever is frozen or unfrozen later.
        self._reduced = [p for p in model.module.parameters() if p.requires_grad]
        self.ranks = Ranks(model.process_group)
        self.factor = 1 if getattr(model, SUMS, False) else self.ranks.size

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        if not last:
            return self.wrapper.no_sync()
        if len(self._late()) or not all(p.requires_grad for p in self._reduced):
            raise FrozenLater(
                "a parameter was frozen or unfrozen after DistributedDataParallel was made, which reduces "
                "those of its beginning; Recovery (accum.recover=true) reduces those that train"
            )
        return NOTHING

    def _late(self) -> list[nn.Parameter]:
        """The parameters that train now and did not when DDP was made."""
        reduced = set(map(id, self._reduced))
        return [p for p in self.module.parameters() if p.requires_grad and id(p) not in reduced]

    def begin_without_sync(self) -> None:
        # The communication of DDP's forward. `require_forward_param_sync` is set first, because it is still
        # False after a window that did not call `reduce_gradients`, as with fp32 buffers.
        self.wrapper.require_forward_param_sync = True
        self.wrapper.reducer._rebuild_buckets()
        if self.wrapper.will_sync_module_buffers():
            self.wrapper._sync_buffers()
        self.wrapper.require_forward_param_sync = False

    def watch_use(self) -> None:
        self._trained = [*self._reduced, *self._late()]
        for parameter in self._trained:
            if parameter.grad is not None and not parameter.grad.is_sparse:
                # The views of a bucket share one version counter; `data` has one of its own.
                parameter.grad = parameter.grad.data
        self._marks = [(p.grad, _version(p.grad)) for p in self._trained]

    def unused(self) -> list[int]:
        return [
            index
            for index, (parameter, mark) in enumerate(zip(self._trained, self._marks, strict=True))
            if parameter.grad is mark[0] and _version(parameter.grad) == mark[1]
        ]

    def reduce_gradients(self, some_unused: bool = False) -> None:
        """Runs DDP's reduction, bucket by bucket and in its memory, by a backward that adds -0.0."""
        by_nobody: list[int] = []
        if some_unused:
            here = set(self.unused())
            used = self.ranks.largest([index not in here for index in range(len(self._trained))])
            by_nobody = [index for index, anywhere in enumerate(used) if not anywhere]
        for parameter in self._trained:
            if parameter.grad is None:  # the other ranks wait for its reduction
                parameter.grad = torch.zeros_like(parameter)
        for parameter in self._trained[len(self._reduced) :]:
            self.ranks.sum(parameter.grad)
        frozen = [parameter for parameter in self._reduced if not parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        zero = _AddNegativeZero.apply(*self._reduced)
        reducer = self.wrapper.reducer
        reducer.prepare_for_forward()
        # DDP searches this graph for the parameters that this rank did not use: none.
        reducer.prepare_for_backward([zero] if self.wrapper.find_unused_parameters else [])
        zero.backward()
        for parameter in frozen:
            parameter.requires_grad_(False)
        for parameter in [*frozen, *(self._trained[index] for index in by_nobody)]:
            parameter.grad = None
        self._marks = []
        self.wrapper.require_forward_param_sync = True


def _version(gradient: Tensor | None) -> int:
    return -1 if gradient is None else gradient._version


class _AddNegativeZero(torch.autograd.Function):
    """A function of parameters whose backward adds -0.0 to each gradient, which leaves even a 0's sign."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # None for a sparse gradient, which a dense one would make dense.
        return tuple(None if p.grad.is_sparse else p.new_full((), -0.0).expand_as(p) for p in ctx.parameters)


class FullyShardedSync(Sync):
    """`fully_shard`: a reduce-scatter per sharded module, once a window or once a micro-batch."""

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
        # Without `set_is_last_backward(False)`: with it torch would keep the unsharded gradient of the block
        # that it reduced last, and gather one block too many.
        self.wrapper.set_requires_gradient_sync(last or self.every)
        return NOTHING


def unused_parameters(error: RuntimeError, model: nn.Module) -> list[str]:
    """The parameters of `model` of which DDP says in `error` that its last backward did not reach them."""
    indices = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    numbers = map(int, indices[1].split()) if indices else ()
    return [trained[number] for number in numbers if number < len(trained)]


def sync_of(model: nn.Module, reduce_every_micro_batch: bool = False) -> Sync:
    """The synchronisation of `model`, chosen by its wrapper."""
    if isinstance(model, DistributedDataParallel):
        return DataParallelSync(model)
    # By its method, not its class: importing torch.distributed.fsdp takes as long as half of torch.
    if hasattr(model, "set_requires_gradient_sync"):
        return FullyShardedSync(model, reduce_every_micro_batch)
    return Sync(model)


def data_parallel(
    model: nn.Module, *, find_unused_parameters: bool = False, group: dist.ProcessGroup | None = None
) -> DistributedDataParallel:
    """Wraps `model` in a DistributedDataParallel that sums gradients over the ranks, in their own memory.

    With sums an fp16 backward overflows where the larger batch's does, at any number of ranks. For use with
    `Window` only: each backward outside of `no_sync` would sum again what was accumulated before.
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
    """Shards the parameters of `model` over the ranks, block by block, with summed gradients.

    A block is a direct child of the model, or an item of a direct child that is a list of layers. Parameters
    of a block are gathered only while it computes.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group or _world(), device.type)
    blocks = [
        item
        for child in model.children()
        for item in (child.children() if isinstance(child, LISTS) else [child])
        if any(p.requires_grad for p in item.parameters())
    ]
    for module in [*blocks, model]:
        sharded = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    setattr(model, SUMS, True)
    return model


def plain(tensor: Tensor) -> Tensor:
    """This process's shard of `tensor` if it is a DTensor, else `tensor`."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is not initialised"
    return world


def _add(group: Any, bucket):  # DDP refuses a hook whose annotations are strings, as they are here
    """DDP's communication hook: one all-reduce of the bucket, summed instead of averaged."""
    work: Any = dist.all_reduce(bucket.buffer(), dist.ReduceOp.SUM, group, async_op=True)
    return work.get_future().then(lambda done: done.value()[0])
