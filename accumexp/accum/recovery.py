"""Out of memory is not the end: back to the window's start, and the same samples in more micro-batches."""

from __future__ import annotations

import gc
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .batch import Nested, batch_size
from .memory import is_out_of_memory
from .window import Observer, Window, WindowResult

# Windows in a row that leave Python's `random` alone, after which its state, slow to copy, is not kept.
QUIET = 3


@dataclass(frozen=True)
class OutOfMemory:
    """A window that ran out of memory and begins again, finer.

    Attributes:
        rank: that failed, the first of several.
        micro_batch: that it failed in, from 0, of `steps`.
        at_most: samples that a micro-batch of any rank has from now on.
    """

    rank: int
    micro_batch: int
    steps: int
    at_most: int


class Recovery:
    """`Window.backward` for a device whose memory may run out.

    Where it does, in any micro-batch on any rank, all ranks go back to the window's start (gradients, buffers
    of model and loss, the generators of torch, and Python's `random` if the first windows draw from it; not
    NumPy's) and make the same update in micro-batches half as large, until there is memory. Later windows are
    split as fine, in as many micro-batches as were asked for at least. What results is to the bit what a
    window of that many micro-batches gives.

    Gradients are not copied: going back is `None`, or zeros in place on several ranks, so they must be so
    when the window begins. One process that finds `.grad` tensors there (`zero_grad(set_to_none=False)`) does
    not know whether they are zeros, and lets the error pass.

    On several ranks no micro-batch waits for another rank: the ranks agree when each has done its own, on
    the host, and gradients are added then. So no reduction hides behind the last backward.

    The memory to go back from is taken here, not in a window, where a rank without it would leave the
    others waiting.

    Args:
        tell: called on all ranks with each `OutOfMemory`, before the window begins again.

    Attributes:
        at_most: samples that a micro-batch may have on a rank, or None as long as nothing failed.

    Raises:
        ValueError: for a window that cannot be split finer by a rank alone, or not without a change of the
            update: `refusal` says which.
    """

    def __init__(self, window: Window, notify: Callable[[OutOfMemory], None] | None = None) -> None:
        refusal = self.refusal(window)
        if refusal is not None:
            raise ValueError(refusal)
        self.window = window
        self.notify = notify
        self.at_most: int | None = None
        # A wrapper's backward that fails in its reduction cannot be begun again, even on a single rank.
        self._alone = not window.sync.keeps_gradients
        self._start = _Start(window)
        self._largest = 0  # samples in a micro-batch of this rank
        self._agreed = False

    @staticmethod
    def refusal(window: Window) -> str | None:
        """Why `window` cannot be made again in more micro-batches, or None."""
        if window.sync.sharded:
            return "a fully sharded model waits for all ranks in every forward: none goes back alone"
        if window.reduction == "sum":
            return "a sum of micro-batch means grows with the micro-batches: more of them are another update"
        if window.sync.ranks.size > 1:
            parts = [part for part in (window.model, window.loss) if isinstance(part, nn.Module)]
            if any(isinstance(module, nn.SyncBatchNorm) for part in parts for module in part.modules()):
                return "SyncBatchNorm waits for all ranks in every forward: none goes back alone"
        return None

    def backward(
        self,
        inputs: Nested,
        targets: Nested,
        *,
        steps: int | None = None,
        samples: int | None = None,
        weight: float | None = None,
        observe: Observer | None = None,
    ) -> WindowResult:
        """As `Window.backward`; the result's `steps` are those that were made.

        What is called in between (`observe`, `Window.after_micro_batch`) sees a window that failed too, and
        `Window.on_discard` tells it so.

        Raises:
            torch.OutOfMemoryError: on all ranks, if one sample in a micro-batch is too much for one of them,
                or if it happens where they work together: when DDP, before the first micro-batch, shares
                buffers and once makes its buckets anew, and when the gradients of the ranks are added.
        """
        window = self.window
        own = batch_size((inputs, targets)) if samples is None else samples
        asked = window.steps if steps is None else steps
        steps = asked if self.at_most is None else self._steps(own, asked)
        if not self._alone:
            window.sync.begin_without_sync()
        self._start.remember()
        agree = None if self._alone else self._agree
        while True:
            self._agreed = False
            self._largest = -(-own // steps) if steps > 0 else 0
            failure: _Failure | None = None
            reason = ""
            try:
                return window.backward(
                    inputs, targets, steps=steps, samples=samples, weight=weight, observe=observe, agree=agree
                )
            except _Elsewhere as elsewhere:
                failure = elsewhere.failure
            except Exception as error:
                if self._agreed or not is_out_of_memory(error):
                    raise
                if not self._start.clean:
                    error.add_note("there were gradients before this window, so it cannot begin again")
                    raise
                reason = str(error).partition("\n")[0]
                _let_go(error)
            failure = failure or self._failure(failed=True)
            assert failure is not None
            self._start.restore()
            if failure.too_large < 2:
                where = f"one sample in a micro-batch is too much on rank {failure.rank}"
                raise torch.OutOfMemoryError(f"{where}: {reason}" if reason else where)
            self.at_most = -(-failure.largest // 2)
            if self.notify is not None:
                self.notify(OutOfMemory(failure.rank, failure.micro_batch, steps, self.at_most))
            steps = self._steps(own, asked)

    def state_dict(self) -> dict[str, Any]:
        return {"at_most": self.at_most}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at_most = state["at_most"]

    def _steps(self, own: int, asked: int) -> int:
        """`asked`, or as many micro-batches as are needed since one was too large, on all ranks alike."""
        assert self.at_most is not None
        return self.window.sync.ranks.largest([max(asked, -(-own // self.at_most))])[0]

    def _agree(self) -> None:
        failure = self._failure(failed=False)
        if failure is not None:
            raise _Elsewhere(failure)
        self._agreed = True

    def _failure(self, failed: bool) -> _Failure | None:
        """What happened in the window on all ranks, who must all ask."""
        ranks = self.window.sync.ranks
        place = ((ranks.size - ranks.rank) << 32 | self.window.under_way) if failed else 0
        found = ranks.largest([place, self._largest, self._largest if failed else 0])
        place, largest, too_large = found
        if not place:
            return None
        return _Failure(ranks.size - (place >> 32), place & 0xFFFFFFFF, largest, too_large)


@dataclass(frozen=True)
class _Failure:
    """Where a window failed, and the most samples in a micro-batch of all ranks and of those that failed."""

    rank: int
    micro_batch: int
    largest: int
    too_large: int


class _Elsewhere(Exception):
    """Another rank has no memory for this window."""

    def __init__(self, failure: _Failure) -> None:
        super().__init__("out of memory on another rank")
        self.failure = failure


class _Start:
    """What a window changes, as it was when the window began."""

    def __init__(self, window: Window) -> None:
        self.window = window
        parts = [window.model, window.loss]
        # What holds the buffers of each module: one may get its first at any time.
        self._held = [m._buffers for part in parts if isinstance(part, nn.Module) for m in part.modules()]
        self._parameters = list(window.model.parameters())
        self._absent: list[nn.Parameter] = []
        self._buffers: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
        # Those of them that have been made, and what was in them.
        self._made: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._torch = self._python = self._device = None
        self._quiet = 0
        self.clean = True
        self._make_room([buffer for buffer in self._present() if not is_lazy(buffer)])

    def remember(self) -> None:
        """Nothing here waits for the device, and gradients are not copied."""
        self._absent = [p for p in self._parameters if p.grad is None]
        self.clean = self.window.sync.keeps_gradients or len(self._absent) == len(self._parameters)
        self._torch = torch.default_generator.get_state()
        if self._quiet < QUIET:
            before, self._python = self._python, random.getstate()
            self._quiet = self._quiet + 1 if self._python == before else 0
        else:
            self._python = None
        if self._parameters[0].is_cuda:
            self._device = torch.cuda.get_rng_state(self._parameters[0].device)
        self._buffers = [(held, name, buffer) for held in self._held if held for name, buffer in held.items()]
        self._made = [b for _, _, b in self._buffers if b is not None and not is_lazy(b)]
        if self._made:
            with torch.no_grad():  # a buffer may carry a graph
                self._make_room(self._made)
                torch._foreach_copy_(self._kept, self._made)  # pyright: ignore[reportPrivateImportUsage]

    def restore(self) -> None:
        gc.collect()  # what failed may be in cycles
        self.window.discard()
        for parameter in self._absent:
            parameter.grad = None
        with torch.no_grad():
            for parameter in self._parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()
            for held, name, buffer in self._buffers:
                held[name] = buffer
            if self._made:
                torch._foreach_copy_(self._made, self._kept)  # pyright: ignore[reportPrivateImportUsage]
        assert self._torch is not None
        torch.set_rng_state(self._torch)
        if self._python is not None:
            random.setstate(self._python)
        device = self._parameters[0].device
        if self._device is not None:
            torch.cuda.set_rng_state(self._device, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def _present(self) -> list[Tensor]:
        return [buffer for held in self._held for buffer in held.values() if buffer is not None]

    def _make_room(self, buffers: list[Tensor]) -> None:
        if len(buffers) != len(self._kept) or not all(map(_alike, buffers, self._kept)):
            self._kept = [torch.empty_like(buffer) for buffer in buffers]


def _let_go(error: BaseException | None) -> None:
    """Empties the frames that `error` has come through, of what failed: whoever keeps it keeps no tensor."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # an error may be its own cause
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype is other.dtype and one.device == other.device
