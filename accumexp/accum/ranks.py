"""The processes that share a window, and what they tell each other besides gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The ranks of a process group, or this process alone.

    Sums and maxima are in place, on the tensor's own device; on a GPU the host does not wait for them.
    All ranks must ask for the same things in the same order.
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

    def sum_soon(self, tensor: Tensor) -> Callable[[], None]:
        """Starts `sum`; the result is there when what is returned has been called."""
        work: Any = dist.all_reduce(tensor, dist.ReduceOp.SUM, self.group, async_op=True)
        return work.wait

    def any(self, flag: Tensor) -> Tensor:
        """Whether `flag`, a bool of shape (), is true on any rank; shape ()."""
        if self.size == 1:
            return flag
        raised = flag.to(torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, self.group)
        return raised > 0

    def largest(self, numbers: list[int]) -> list[int]:
        """The largest of each number over the ranks.

        The host waits for the other hosts, and not for its device, where the group has a backend for the CPU.
        """
        if self.size == 1:
            return numbers
        device = "cpu" if "cpu:" in dist.get_backend_config(self.group) else "cuda"
        found = torch.tensor(numbers, dtype=torch.int64, device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        return found.tolist()


ALONE = Ranks(alone=True)


class Agreement:
    """Lets every rank know of a wish of any rank at the same update, without waiting for the device.

    A wish is a number, 0 for none; of several the largest counts. The wishes of one update travel while
    the next is computed, so that all ranks know of them an update later. One process knows at once.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._largest = torch.zeros((), dtype=torch.int32)
        self._under_way: Any = None

    def soon(self, wish: int) -> int:
        """Sends `wish` and returns the largest that was sent when this was last called."""
        if self.ranks.size == 1:
            return wish
        arrived = self._arrived()
        self._largest.fill_(wish)
        self._under_way = dist.all_reduce(self._largest, dist.ReduceOp.MAX, self.ranks.group, async_op=True)
        return arrived

    def now(self, wish: int) -> int:
        """The largest wish of all ranks, now or when `soon` was last called. Waits for all ranks."""
        self.soon(max(wish, self._arrived()))
        return wish if self.ranks.size == 1 else self._arrived()

    def _arrived(self) -> int:
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None
        return int(self._largest)
