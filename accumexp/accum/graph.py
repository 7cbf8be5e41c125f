"""The window as one CUDA graph: recorded once, replayed without the host's part of every kernel.

A small model's kernels end sooner than the host can launch them. A recorded window (all its micro-batches,
forward and backward) and a recorded step (unscale, clip, optimizer, loss scale) are one launch each. They
compute what the same calls compute without a graph (but for learning rates, which a tensor holds in fp32), on
tensors that stay where they were when recorded. Hooks of modules, tensors and optimizers are not called by a
replay.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batch import Nested, map_tensors, tensors
from .step import OptimizerStep, StepResult
from .window import Observer, Window, WindowResult

# Calls of a kind that are carried out before one is recorded: kernels are chosen and loaded, and optimizer
# state is made, in the first ones.
FIRST = 2
# Kinds of window, by sizes and shapes, that are kept.
MOST = 16

# Windows in a row that are computed because something moved, after which that is said.
IN_A_ROW = 2 * FIRST
MOVED = (
    "windows are computed, not replayed: gradients, parameters, buffers or modes are others than the window "
    "before has left; zero gradients in place, with zero_grad(set_to_none=False)"
)

Record = Callable[[Callable[[], Any]], Callable[[], Any]]


class CudaGraphs:
    """Records what is called, on a stream of its own and in memory that all its graphs share.

    A graph may use the memory of another because nothing of a replay is read after the next one: its results
    are copied at once.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        # Once no graph of a pool is left, nothing more is recorded into it while a tensor there is alive.
        self._first = self(lambda: torch.zeros((), device=self._device))

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """A replay of `function`, which returns the tensors that `function` returned, filled anew.

        Raises:
            RuntimeError: for work that no graph can hold, such as a copy that the host waits for.
        """
        graph = torch.cuda.CUDAGraph()
        # Threads of others, such as those that watch the machine, do not disturb it.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
        ):
            results = function()

        def replay() -> Any:
            with torch.cuda.device(self._device):
                graph.replay()
            return results

        return replay


@dataclass(frozen=True)
class _Kept:
    """A recorded window, and the tensors that a batch is copied into before it is replayed."""

    inputs: Nested
    targets: Nested
    replay: Callable[[], tuple[WindowResult, list[tuple[Any, Nested]]]]


class GraphedWindow:
    """`Window.backward`, replayed where it was recorded before.

    The first windows of a kind (samples, steps, shapes) are computed as they are, the next is recorded.
    Windows that somebody looks into (`Window.after_micro_batch`) and kinds beyond the first 16 always are
    computed. So is a window before which a gradient, parameter or buffer was replaced or a module changed its
    mode: nothing recorded before it is replayed again. Zero gradients in place, with
    `zero_grad(set_to_none=False)`, or there is nothing to replay, which a warning says.

    The memory of the largest recorded window is not given back, so both a recorded window and one that is
    computed as it is need room.

    Args:
        window: of one process, on a GPU, without fp32 buffers.
        record: of both this and the `GraphedStep`.

    Raises:
        ValueError: for a window that cannot be recorded.
    """

    def __init__(self, window: Window, record: Record) -> None:
        if window.sync.ranks.size > 1 or window.sync.sharded or window.fp32_buffers:
            raise ValueError("a window of one process, without fp32 buffers, is recorded")
        self.window = window
        self.record = record
        window.sync.keeps_gradients = True
        self._seen: dict[Hashable, int] = {}
        self._kept: dict[Hashable, _Kept] = {}
        parts = [part for part in (window.model, window.loss) if isinstance(part, nn.Module)]
        self._modules = [module for part in parts for module in part.modules()]
        self._weighted = [*window.loss.parameters()] if isinstance(window.loss, nn.Module) else []
        # What all that is kept was recorded with, and what the last window that was computed has left.
        self._recorded_with: Hashable = None
        self._left: Hashable = None
        self._moved = 0

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
        """As `Window.backward`. The next window overwrites nothing of the result, nor what `observe` got."""
        window = self.window
        steps = window.steps if steps is None else steps
        options: dict[str, Any] = {"steps": steps, "samples": samples, "weight": weight}
        if window.after_micro_batch:
            return window.backward(inputs, targets, **options, observe=observe)
        kind = (steps, samples, weight, observe is not None, _form(inputs), _form(targets))
        found = self._surroundings()
        if found != self._recorded_with:
            self._kept.clear()
        kept = self._kept.get(kind)
        if kept is None:
            seen = self._seen[kind] = self._seen.get(kind, 0) + 1
            moved = found != self._left
            if seen <= FIRST or len(self._kept) >= MOST or moved:
                self._moved = self._moved + 1 if moved else 0
                if self._moved == IN_A_ROW:
                    warnings.warn(MOVED, stacklevel=2)
                result = window.backward(inputs, targets, **options, observe=observe)
                self._left = self._surroundings()
                return result
            kept = self._kept[kind] = self._recorded(inputs, targets, options, observe is not None)
            self._recorded_with = found
        _copy(inputs, kept.inputs)
        _copy(targets, kept.targets)
        result, seen_outputs = kept.replay()
        for outputs, targets_k in seen_outputs if observe is not None else ():
            assert observe is not None
            observe(_cloned(outputs), _cloned(targets_k))
        counted = result.weight
        return replace(
            result,
            loss=result.loss.clone(),
            weight=counted.clone() if isinstance(counted, Tensor) else counted,
        )

    def _recorded(self, inputs: Nested, targets: Nested, options: dict[str, Any], observed: bool) -> _Kept:
        inputs, targets = map_tensors(torch.clone, inputs), map_tensors(torch.clone, targets)

        def window() -> tuple[WindowResult, list[tuple[Any, Nested]]]:
            seen: list[tuple[Any, Nested]] = []

            def observe(outputs: Any, targets_k: Nested) -> None:
                seen.append((_mapped(torch.Tensor.detach, outputs), targets_k))

            result = self.window.backward(inputs, targets, **options, observe=observe if observed else None)
            return result, seen

        before = self._surroundings()
        held = [(m._buffers, name, buffer) for m in self._modules for name, buffer in m._buffers.items()]
        try:
            replay = self.record(window)
        finally:
            moved = self._surroundings() != before
            for buffers, name, buffer in held if moved else ():
                buffers[name] = buffer
        if moved:
            raise RuntimeError("a forward pass replaces a buffer, and a graph works on the one it began with")
        return _Kept(inputs, targets, replay)

    def _surroundings(self) -> Hashable:
        """Where everything is that a recorded window works on, and in which mode each module is."""
        return (
            places(self.window),
            tuple([p.data_ptr() for p in self._weighted]),
            tuple([b.data_ptr() for m in self._modules for b in m._buffers.values() if b is not None]),
            tuple([m.training for m in self._modules]),
        )


class GraphedStep:
    """`OptimizerStep`, replayed where it was recorded before.

    Learning rates become tensors on the device, which a schedule fills. An optimizer that cannot be recorded
    (none of torch's fused ones, or without `capturable` where it has that) steps as it is, once an update.

    Args:
        record: as that of the `GraphedWindow`, whose gradients are stepped on.
    """

    def __init__(self, step: OptimizerStep, record: Record) -> None:
        self.step = step
        self.record = record
        self._seen = 0
        self._known: Hashable = None
        self._state: Any = None
        self._rates: list[Tensor] = []
        self._kept: dict[bool, Callable[[], StepResult]] = {}

    def __call__(self, want_norm: bool = False) -> StepResult:
        """As `OptimizerStep`. Nothing of the result is overwritten by the next step."""
        if not can_be_recorded(self.step):
            return self.step(want_norm)
        optimizer = self.step.optimizer
        rates = rates_to_device(optimizer)
        known = places(self.step.window), settings(optimizer)
        # Compared as objects: a state that was loaded is another one, whatever is in it.
        same = optimizer.state is self._state and [id(r) for r in rates] == [id(r) for r in self._rates]
        if not same or known != self._known:
            self._kept.clear()
            self._known, self._state, self._rates, self._seen = known, optimizer.state, rates, 0
        self._seen += 1
        if self._seen <= FIRST:
            return self.step(want_norm)
        replay = self._kept.get(want_norm)
        if replay is None:
            replay = self._kept[want_norm] = self.record(lambda: self.step(want_norm))
        found = replay()
        return StepResult(*(None if t is None else t.clone() for t in (found.norm, found.overflow)))


def places(window: Window) -> tuple[Hashable, ...]:
    """Where parameters and gradients are: a graph works on the memory that it was recorded with."""
    return tuple(
        (p.data_ptr(), p.requires_grad, 0 if p.grad is None else p.grad.data_ptr())
        for p in window.model.parameters()
    )


def settings(optimizer: torch.optim.Optimizer) -> tuple[Hashable, ...]:
    """What a recorded step has of its optimizer once and for all: everything but the learning rates."""
    return tuple(
        (key, id(value) if isinstance(value, Tensor) else value)
        for group in optimizer.param_groups
        for key, value in group.items()
        if key not in ("params", "lr")
    )


def can_be_recorded(step: OptimizerStep) -> bool:
    """Whether all of the step happens on the device, whatever the gradient."""
    optimizer = step.optimizer
    if step.window.loss_scale is not None and not step.skips_on_device:
        return False
    groups = optimizer.param_groups
    # A fused kernel takes the learning rate from a tensor of fp32, which is another rate in fp64.
    return all(
        group.get("fused")
        and group.get("capturable", True)
        and all(p.dtype is not torch.float64 for p in group["params"])
        for group in groups
    )


def rates_to_device(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Makes every learning rate that is a number a tensor beside its parameters; all of them."""
    found: list[Tensor] = []
    for group in optimizer.param_groups:
        device = group["params"][0].device
        rate = group["lr"]
        if not isinstance(rate, Tensor) or rate.device != device:
            group["lr"] = torch.full((), float(rate), dtype=torch.float32, device=device)
        found.append(group["lr"])
    return found


def rates_as_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's `state_dict` with numbers for the learning rates that `rates_to_device` made tensors."""
    groups = [
        {key: float(value) if key == "lr" else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


def _mapped(function: Callable[[Tensor], Any], outputs: Any) -> Any:
    """What a model returned, of the same types, with `function` of its tensors as far as torch finds them."""
    return pytree.tree_map_only(Tensor, function, outputs)


def _cloned(outputs: Any) -> Any:
    return _mapped(torch.clone, outputs)


def _form(batch: Nested) -> tuple[Hashable, ...]:
    return tuple((tuple(t.shape), t.dtype, t.device) for t in tensors(batch))


def _copy(batch: Nested, kept: Nested) -> None:
    for source, target in zip(tensors(batch), tensors(kept), strict=True):
        target.copy_(source)
