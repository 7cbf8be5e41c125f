"""The processes that share a window, and their collectives besides the gradients' reduction."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SUMS = itertools.count()


class Ranks:
    """The ranks of a process group, or this process alone.

    Reductions work in place on the tensor's device; on a GPU the host does not wait for them. As with any
    collective, all ranks must make the same calls in the same order.

    Args:
        group: the process group, by default torch's default group.
        alone: one process, without torch.distributed.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        self.group = group
        self.rank = 0 if alone else dist.get_rank(group)
        self.size = 1 if alone else dist.get_world_size(group)

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`, summed over the ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM, self.group)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in their order; all have one shape."""
        if self.size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.contiguous(), self.group)
        return gathered

    def objects(self, value: Any) -> list[Any]:
        """The objects of all ranks, in their order. The hosts wait for each other."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, self.group)
        return gathered

    def sum_soon(self, tensor: Tensor) -> Callable[[], None]:
        """Starts `sum` asynchronously. Returns a function that waits for it."""
        work: Any = dist.all_reduce(tensor, dist.ReduceOp.SUM, self.group, async_op=True)
        return work.wait

    def sum_if_all_come(self, tensor: Tensor, seconds: float = 2.0) -> Tensor:
        """`sum` of a tensor of shape (n,) after an error, when a rank may be in another collective, or gone.

        The numbers go through the group's store, and no rank waits longer than `seconds`.

        Raises:
            RuntimeError: if a rank does not come within `seconds`, or with another shape.
        """
        if self.size == 1:
            return tensor
        store = dist.distributed_c10d._get_default_store()
        number = next(_SUMS)
        keys = [f"accumexp/sum/{number}/{rank}" for rank in range(self.size)]
        store.set(keys[self.rank], json.dumps(tensor.tolist()))
        end = time.monotonic() + seconds
        while not store.check(keys):  # `wait` would print a warning of C++
            if time.monotonic() > end:
                raise RuntimeError("a rank did not come")
            time.sleep(0.02)
        parts = torch.tensor([json.loads(store.get(key)) for key in keys], dtype=tensor.dtype)
        return parts.sum(0).to(tensor.device)

    def any(self, flag: Tensor) -> Tensor:
        """Whether `flag`, a bool of shape (), is true on any rank; shape ()."""
        if self.size == 1:
            return flag
        raised = flag.to(torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, self.group)
        return raised > 0

    def largest(self, numbers: list[int]) -> list[int]:
        """The elementwise maximum over the ranks.

        The host waits for the other hosts, but not for its device if the group has a CPU backend.
        """
        if self.size == 1:
            return numbers
        device = "cpu" if "cpu:" in dist.get_backend_config(self.group) else "cuda"
        maxima = torch.tensor(numbers, dtype=torch.int64, device=device)
        dist.all_reduce(maxima, dist.ReduceOp.MAX, self.group)
        return maxima.tolist()


ALONE = Ranks(alone=True)


class Agreement:
    """Spreads a request of any rank to all ranks at the same update, without waiting for the device.

    A request is a number, 0 for none; the largest counts. On several ranks the all-reduce overlaps with the
    next update, and the result comes an update later.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._largest = torch.zeros((), dtype=torch.int32)
        self._under_way: Any = None

    def soon(self, request: int) -> int:
        """Starts the reduction of `request` and returns the result of the previous call's reduction."""
        if self.ranks.size == 1:
            return request
        arrived = self._arrived()
        self._largest.fill_(request)
        self._under_way = dist.all_reduce(self._largest, dist.ReduceOp.MAX, self.ranks.group, async_op=True)
        return arrived

    def now(self, request: int) -> int:
        """The largest request of all ranks, of this call and of the last `soon`. Waits for all ranks."""
        self.soon(max(request, self._arrived()))
        return request if self.ranks.size == 1 else self._arrived()

    def _arrived(self) -> int:
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None
        return int(self._largest)
