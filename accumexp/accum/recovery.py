"""Recovery from out of memory: restores the window's start and repeats it in smaller micro-batches."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .batch import Nested, batch_size
from .choose_objective import trained_parameters
from .forward_state import ForwardState
from .memory import is_out_of_memory
from .sync import DataParallelSync
from .window import Observer, Window, WindowResult


@dataclass(frozen=True)
class OutOfMemory:
    """A window that ran out of memory and is repeated in smaller micro-batches.

    Attributes:
        rank: the rank that failed, the first of several.
        micro_batch: the index of the micro-batch that failed, from 0.
        steps: micro-batches in the window.
        at_most: the largest number of samples in a micro-batch on a rank from now on.
    """

    rank: int
    micro_batch: int
    steps: int
    at_most: int


class Recovery:
    """`Window.backward` that recovers from out of memory.

    If any micro-batch on any rank runs out of memory, all ranks restore the window's start (gradients,
    buffers of model and loss, the generators of torch and Python's `random`, but not NumPy's) and repeat the
    update in micro-batches half as large, until it succeeds. Later windows keep this limit. The result has
    the bits of a window of that many micro-batches.

    Gradients are not copied but reset to `None`, or on several ranks to zeros in place, and must be so when a
    window begins. On one process `.grad` tensors that exist then may not be zeros, so the error is raised.

    On several ranks the ranks exchange their status on the host after the last micro-batch and then reduce
    gradients, so the reduction does not overlap with the last backward. The memory of the restored state is
    allocated here: a rank that could not allocate it in a window would leave the others waiting.

    Args:
        notify: called on all ranks with each `OutOfMemory`, before the window is repeated.

    Attributes:
        at_most: the largest number of samples in a micro-batch on a rank, or None before the first failure.

    Raises:
        ValueError: for a window that cannot be repeated, with the reason that `refusal` gives.
    """

    def __init__(self, window: Window, notify: Callable[[OutOfMemory], None] | None = None) -> None:
        refusal = self.refusal(window)
        if refusal is not None:
            raise ValueError(refusal)
        self.window = window
        self.notify = notify
        self.at_most: int | None = None
        # DDP's backward cannot be repeated once it failed in its reduction, even on a single rank.
        self._alone = not isinstance(window.sync, DataParallelSync)
        self._start = _Start(window)
        self._largest = 0  # samples in a micro-batch of this rank
        self._agreed = False

    @staticmethod
    def refusal(window: Window) -> str | None:
        """Why `window` cannot be repeated in more micro-batches, or None if it can."""
        if window.sync.sharded:
            return "a fully sharded model waits for all ranks in every forward: none goes back alone"
        if window.reduction == "sum":
            return "a sum of micro-batch means grows with the micro-batches: more of them are another update"
        if trained_parameters(window.loss):
            return "the loss has parameters, whose gradients are not restored: make them the model's"
        if window.sync.ranks.size > 1:
            parts = [part for part in (window.model, window.loss) if isinstance(part, nn.Module)]
            if any(isinstance(module, nn.SyncBatchNorm) for part in parts for module in part.modules()):
                return "SyncBatchNorm waits for all ranks in every forward: none goes back alone"
        return None

    def backward(
        self,
        inputs: Nested,
        targets: Nested | None = None,
        *,
        steps: int | None = None,
        samples: int | None = None,
        weight: float | None = None,
        observe: Observer | None = None,
    ) -> WindowResult:
        """As `Window.backward`; the result's `steps` are those of the repetition that succeeded.

        `observe` and `Window.after_micro_batch` are called for a failed window too; `Window.on_discard` is
        called when it is discarded.

        Raises:
            ValueError: for a list of micro-batches, which is split already.
            torch.OutOfMemoryError: on all ranks, if a micro-batch of one sample is too large for one of them,
                or if a collective runs out of memory: DDP's broadcast of buffers and its rebuilding of
                buckets, before the first micro-batch, and the reduction of gradients.
        """
        if targets is None:
            raise ValueError("backward: a list of micro-batches is split already; give inputs and targets")
        window = self.window
        count = batch_size((inputs, targets)) if samples is None else samples
        requested = window.steps if steps is None else steps
        steps = requested if self.at_most is None else self._steps(count, requested)
        if not self._alone:
            window.sync.begin_without_sync()
        self._start.save()
        agree = None if self._alone else self._agree
        while True:
            self._agreed = False
            self._largest = -(-count // steps) if steps > 0 else 0
            failure: _Failure | None = None
            reason = ""
            try:
                return window.backward(
                    inputs, targets, steps=steps, samples=samples, weight=weight, observe=observe, agree=agree
                )
            except _OtherRankFailed as error:
                failure = error.args[0]
            except Exception as error:
                if self._agreed or not is_out_of_memory(error):
                    raise
                if not self._start.clean:
                    error.add_note("there were gradients before this window, so it cannot begin again")
                    raise
                reason = str(error).partition("\n")[0]
                _clear_frames(error)
            failure = failure or self._exchange(failed=True)[0]
            assert failure is not None
            self._start.restore()
            if failure.too_large < 2:
                where = f"one sample in a micro-batch is too much on rank {failure.rank}"
                raise torch.OutOfMemoryError(f"{where}: {reason}" if reason else where)
            self.at_most = -(-failure.largest // 2)
            if self.notify is not None:
                self.notify(OutOfMemory(failure.rank, failure.micro_batch, steps, self.at_most))
            steps = self._steps(count, requested)

    def state_dict(self) -> dict[str, Any]:
        return {"at_most": self.at_most}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at_most = state["at_most"]

    def _steps(self, samples: int, requested: int) -> int:
        """The micro-batches on all ranks: `requested`, or more if a rank's would be larger than `at_most`."""
        assert self.at_most is not None
        return self.window.sync.ranks.largest([max(requested, -(-samples // self.at_most))])[0]

    def _agree(self, unused: bool, more: bool = False) -> bool:
        failure, unused = self._exchange(failed=False, unused=unused)
        if failure is not None:
            raise _OtherRankFailed(failure)
        self._agreed = not more
        return unused

    def _exchange(self, failed: bool, unused: bool = False) -> tuple[_Failure | None, bool]:
        """The first failure in the window on any rank, and whether `unused` on any. A collective."""
        ranks = self.window.sync.ranks
        # The maximum is the first rank that failed, with the micro-batch in the lower 32 bits.
        place = ((ranks.size - ranks.rank) << 32 | self.window.under_way) if failed else 0
        too_large = self._largest if failed else 0
        place, largest, too_large, unused_anywhere = ranks.largest([place, self._largest, too_large, unused])
        if not place:
            return None, bool(unused_anywhere)
        failure = _Failure(ranks.size - (place >> 32), place & 0xFFFFFFFF, largest, too_large)
        return failure, bool(unused_anywhere)


@dataclass(frozen=True)
class _Failure:
    """The place of a failure, and the largest micro-batch of all ranks and of those that failed."""

    rank: int
    micro_batch: int
    largest: int
    too_large: int


class _OtherRankFailed(Exception):
    """Another rank ran out of memory in this window. The argument is the `_Failure`."""


class _Start(ForwardState):
    """The state that a window changes, as it was when the window began."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self._parameters = list(window.model.parameters())
        self._absent: list[nn.Parameter] = []
        self.clean = True  # whether gradients can be restored without a copy
        super().__init__([window.model, window.loss], self._parameters[0].device)

    def save(self) -> None:
        self._absent = [p for p in self._parameters if p.grad is None]
        self.clean = self.window.sync.keeps_gradients or len(self._absent) == len(self._parameters)
        super().save()

    def restore(self) -> None:
        gc.collect()  # tensors of the failed window may be in reference cycles
        self.window.discard()
        for parameter in self._absent:
            parameter.grad = None
        with torch.no_grad():
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()
        super().restore()
        if self._parameters[0].is_cuda:
            torch.cuda.empty_cache()


def _clear_frames(error: BaseException | None) -> None:
    """Clears the frames of `error`'s traceback, so that the error keeps no tensor alive."""
    cleared: set[int] = set()
    while error is not None and id(error) not in cleared:  # an error may be its own cause
        cleared.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
