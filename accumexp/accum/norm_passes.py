"""The passes of a window that make its norms exact: first their statistics, then the gradients through them.

The statistics of a norm depend on those of the norms before it, so they are fixed one after the other, in
forward passes without gradients that end at the norm. The gradient of a norm's input needs two sums over
the window: of its output's gradient, and of the products with the normalised input. They depend on the sums
of the norms after it, so they are found from the last norm to the first, in sweeps: a forward and a backward
of all micro-batches down to the norms whose sums are next, without gradients of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from .batch import Nested, tensors
from .forward_state import ForwardState, Generators
from .memory import SavedActivations, measure_activations
from .norm_levels import Call, Marked, check_norms, groups_of, levels_of
from .refusals import ModelRefused
from .sync import Sync
from .window_batch import WindowBatch
from .window_norm import Statistics, WindowBatchNorm, normalised

ValueOf = Callable[[int, Any, Nested], tuple[Tensor, Tensor]]

# Difference of a micro-batch's mean in two passes, in standard deviations, that rounding cannot explain.
OTHER, OTHER_FP64 = 1e-2, 1e-6
OTHER_CALLS = (
    "a norm over the window has to be called in every micro-batch, in the same order; the model calls it "
    "depending on the data or on draws"
)
NO_SUMS = (
    "the passes before the backward found no path from the loss to this norm over the window: give "
    "use_reentrant=False to checkpoint, and let the loss of every micro-batch depend on the norm's output"
)


class WindowNorms:
    """The norms of a window, while it computes: a context that attaches them.

    Args:
        modules: the norms.
        parts: model and loss.
        forward, precision, sync, batch, agree, compare: as of `FirstPass`.

    Attributes:
        sweeps: those of this window.
    """

    def __init__(
        self,
        modules: list[WindowBatchNorm],
        parts: list[object],
        sync: Sync,
        forward: Callable[[int, Nested], Any],
        precision: Callable[[], AbstractContextManager[Any]],
        batch: WindowBatch,
        agree: Callable[..., bool] | None,
        compare: bool,
    ) -> None:
        check_norms(sync)
        self.sync = sync
        self.forward = forward
        self.precision = precision
        self.batch = batch
        self.compare = compare
        self.sweeps = 0
        self._modules = modules
        self._numbers = {module: number for number, module in enumerate(modules)}
        self._agree = agree
        self._parameter = next(sync.module.parameters())
        self._start = ForwardState(parts, self._parameter.device)
        self._statistics: dict[Call, Statistics] = {}  # of the window, in the order of the calls
        self._sums: dict[Call, Tensor] = {}  # (2, channels) for each call
        self._complete = False  # whether all sums are known
        # Of the pass:
        self._micro_batch = 0
        self._counts: dict[int, int] = {}  # calls of each module in this forward
        self._target: Call | None = None  # whose statistics are collected
        self._collected: list[Statistics] | None = None
        self._values = 0  # of a channel on this rank
        self._orders: list[list[Call]] = []  # by micro-batch, in the first pass
        self._means: dict[tuple[int, Call], Tensor] = {}  # by micro-batch, where passes are compared
        self._differences: list[Tensor] = []
        self._comparing = False
        self._wanted: set[Call] = set()  # whose sums are next
        self._marks: dict[Call, Tensor] | None = None  # in a sweep; `window_norm.normalised`
        self._kept: SavedActivations | None = None
        self._kept_before: dict[Call, int] = {}  # bytes kept for backward before each call

    def __enter__(self) -> WindowNorms:
        for module in self._modules:
            module.window_pass = self
        return self

    def __exit__(self, *error: object) -> None:
        for module in self._modules:
            module.window_pass = None

    def begin(self, k: int) -> None:
        """Begins the forward pass of micro-batch `k`."""
        self._micro_batch = k
        self._counts.clear()

    def normalised(self, module: WindowBatchNorm, input: Tensor) -> Tensor:
        call, padding = self._call(module), not self.batch.sizes[self._micro_batch]
        statistics = self._statistics.get(call)
        if self._collected is not None:
            statistics = self._collect(call, statistics, input, padding)
        if statistics is None:
            raise ModelRefused(f"{self._name(call)}: {OTHER_CALLS}")
        if self._comparing and not padding:
            difference = Statistics.of(input).mean - self._means[self._micro_batch, call]
            self._differences.append((difference / (statistics.variance + module.eps).sqrt()).abs().max())
        mark = None
        if self._marks is not None and call in self._wanted:
            torch.set_grad_enabled(True)  # from the first of these norms on, no earlier
            mark = self._marks[call] = torch.zeros_like(
                torch.stack([statistics.mean] * 2), requires_grad=True
            )
        if self._kept is not None:
            self._kept_before[call] = self._kept.live_bytes
        # The sums are those at the time of the backward: a graph may be kept while they are found.
        sums = (lambda: None) if padding else partial(self._sums_of, call)
        return normalised(module, input, statistics, sums, mark)

    def _sums_of(self, call: Call) -> Tensor | None:
        """The sums of a call, in its backward; None while they are being found.

        Raises:
            ModelRefused: if they were not found, because the sweeps saw no graph from the loss to the call.
        """
        if self._complete and call not in self._sums:
            raise ModelRefused(f"{self._name(call)}: {NO_SUMS}")
        return self._sums.get(call)

    def _collect(self, call: Call, statistics: Statistics | None, input: Tensor, padding: bool) -> Statistics:
        """In a pass for statistics: those to normalise `input` by.

        Raises:
            _Collected: if nothing after this call is needed.
        """
        assert self._collected is not None
        finding = not self._statistics
        if finding:
            self._orders[self._micro_batch].append(call)
            self._target = self._target or call
        if statistics is None:
            statistics = Statistics.of(input)
            if call == self._target:
                self._collected.append(statistics.empty() if padding else statistics)
                self._values += 0 if padding else input.numel() // max(input.shape[1], 1)
            if self.compare:
                self._means[self._micro_batch, call] = statistics.mean
            if not finding:
                raise _Collected
        return statistics

    def _call(self, module: WindowBatchNorm) -> Call:
        number = self._numbers[module]
        if torch._C._current_graph_task_id() != -1:  # the second forward of a checkpointed part
            if self._counts.get(number) == 1:
                return number, 0
            raise ModelRefused(f"{self._name((number, 0))}: called several times and checkpointed")
        before = self._counts.get(number, 0)
        self._counts[number] = before + 1
        return number, before

    def _name(self, call: Call) -> str:
        names = {module: name for name, module in self.sync.module.named_modules()}
        return names[self._modules[call[0]]] or "(model)"

    def fix_statistics(self) -> None:
        """Computes the statistics of all norms, in passes without gradients that leave no trace.

        Raises:
            ValueError: if the micro-batches call the norms in other orders, or a channel has one value.
        """
        if self._agree is None:
            self.sync.begin_without_sync()
        self._start.save()
        # The first pass is whole: it finds the calls, and the generators' state before each micro-batch.
        self._orders = [[] for _ in self.batch.parts]
        states: list[Generators] = []
        self._collected = []
        for k, (inputs, _) in enumerate(self.batch):
            states.append(Generators(self._parameter.device))
            self._forward(k, inputs)
        calls = self._orders[0]
        for order in self._orders:
            for call, other in zip_longest(calls, order):
                if call != other:
                    raise ModelRefused(f"{self._name(call or other)}: {OTHER_CALLS}")
        for call in calls:
            self._target = call
            if self._statistics:
                self._collected, self._values = [], 0
                self._start.restore()
                for k, (inputs, _) in enumerate(self.batch):
                    states[k].restore()
                    self._forward(k, inputs)
            self._statistics[call] = self._joined(self._collected, call)
        self._collected = None
        self._start.restore()

    def _forward(self, k: int, inputs: Nested) -> None:
        with suppress(_Collected), torch.no_grad(), self.sync.micro_batch(False), self.precision():
            self.forward(k, inputs)

    def _joined(self, parts: list[Statistics], call: Call) -> Statistics:
        """The statistics of all micro-batches of all ranks."""
        statistics, ranks = Statistics.joined(parts), self.sync.ranks
        self._wait_for_ranks()
        if ranks.size > 1:
            statistics = Statistics.joined(
                [Statistics.unpacked(each) for each in ranks.gather(statistics.packed())]
            )
        if self._values < 2 and float(statistics.count) < 2:
            raise ModelRefused(f"{self._name(call)}: Expected more than 1 value per channel when training")
        return statistics

    def _wait_for_ranks(self) -> None:
        """Before a collective: fails on all ranks if a micro-batch of this pass has failed on another."""
        if self._agree is not None:
            self._agree(False, more=True)

    def find_sums(self, value_of: ValueOf, seed: Callable[[Tensor], Tensor]) -> None:
        """Computes the sums of all norms over the window.

        Args:
            value_of: a micro-batch's value and share, of its number, outputs and targets.
            seed: the gradient of the value, of its share.

        Raises:
            RuntimeError: if a micro-batch's means differ from those of its first passes.
        """
        self._comparing = self.compare
        for levels in self._groups(value_of):
            self._sweep(levels, value_of, seed)
            if self._comparing:
                self._comparing = False
                self._check()
            self.sweeps += 1
        self._complete = True
        self._start.restore()

    def _value(self, k: int, inputs: Nested, targets: Nested, wanted: set[Call], value_of: ValueOf) -> Marked:
        """The value of micro-batch `k`, with a graph down to the calls `wanted`."""
        self._wanted, marks = wanted, {}
        self._marks = marks
        with torch.no_grad(), self.sync.micro_batch(False), self.precision():
            value, share = value_of(k, self.forward(k, inputs), targets)
        self._marks = None
        return Marked(value, share, marks)

    def _groups(self, value_of: ValueOf) -> list[list[list[Call]]]:
        """The levels of the calls, in the groups of `groups_of`."""
        inputs, targets = next(iter(self.batch))
        self._start.restore()
        self._kept_before = {}
        with measure_activations(self.sync.module, tensors(inputs)) as self._kept:
            marked = self._value(0, inputs, targets, set(self._statistics), value_of)
            most = self._kept.live_bytes
        self._kept = None
        return groups_of(levels_of(marked), self._kept_before, most, len(self.batch.parts))

    def _sweep(self, levels: list[list[Call]], value_of: ValueOf, seed: Callable[[Tensor], Tensor]) -> None:
        """Computes the sums of `levels`, one after the other, over all ranks."""
        self._start.restore()
        wanted = {call for level in levels for call in level}
        graphs: list[Marked] = []
        for level in levels:
            last = level is levels[-1]
            sums = [torch.zeros_like(torch.stack([self._statistics[call].mean] * 2)) for call in level]
            for k, (inputs, targets) in enumerate(self.batch):
                if level is levels[0]:
                    marked = self._value(k, inputs, targets, wanted, value_of)
                    if not last:
                        graphs.append(marked)
                else:
                    marked = graphs[k]
                if self.batch.sizes[k]:
                    leaves = [marked.marks[call] for call in level]
                    options: dict[str, Any] = {"retain_graph": not last, "allow_unused": True}
                    gradients = torch.autograd.grad(marked.value, leaves, seed(marked.share), **options)
                    for total, part in zip(sums, gradients, strict=True):
                        total += 0 if part is None else part
                del marked
            self._wait_for_ranks()
            flat = self.sync.ranks.sum(torch.cat([total.flatten() for total in sums]))
            parts = flat.split([total.numel() for total in sums])
            self._sums |= {call: part.view(2, -1) for call, part in zip(level, parts, strict=True)}

    def _check(self) -> None:
        tolerance = OTHER_FP64 if self._parameter.dtype is torch.float64 else OTHER
        if self._differences and float(torch.stack(self._differences).max()) > tolerance:
            raise ModelRefused(
                "a second forward pass gave other means than the first; the model draws from NumPy or from a "
                "generator of its own, or changes what is neither a parameter nor a buffer"
            )

    def update_running_statistics(self) -> None:
        """Updates the running statistics as one forward pass of the whole batch does."""
        for (number, _), statistics in self._statistics.items():
            self._modules[number].update_running_statistics(statistics)


class _Collected(Exception):
    """Ends a forward pass at the norm whose statistics were needed."""
