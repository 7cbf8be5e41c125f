"""Windows and optimizer steps as CUDA graphs: captured once, then replayed with one launch each.

For small models, whose kernels end sooner than the host can launch them. A replay computes the same as the
calls without a graph, except that learning rates are fp32 tensors, and works on the memory that was captured.
It does not call the hooks of modules, tensors and optimizers.
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
from .window_norm import window_norms

# Eager calls of a kind before its capture: the first ones select and load kernels and create optimizer state.
FIRST = 2
# Recorded kinds of window (sizes and shapes) that are kept.
MOST = 16

# Consecutive eager windows because of moved tensors after which `MOVED` is warned about.
IN_A_ROW = 2 * FIRST
MOVED = (
    "windows are computed, not replayed: gradients, parameters, buffers or modes are others than the window "
    "before has left; zero gradients in place, with zero_grad(set_to_none=False)"
)

# Records a function without arguments and returns a function that replays it.
GraphRecorder = Callable[[Callable[[], Any]], Callable[[], Any]]


class CudaGraphs:
    """A `GraphRecorder` that captures CUDA graphs on its own stream and in one memory pool.

    They may share memory because the results of a replay are copied before the next one.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)
        self._pool: Any = torch.cuda.graph_pool_handle()
        # Keeps the pool in use: torch does not capture into a pool that has tensors but no graph any more.
        self._first = self(lambda: torch.zeros((), device=self._device))

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Captures `function`. The replay returns the tensors that `function` returned, filled again.

        Raises:
            RuntimeError: for work that cannot be captured, such as a copy that the host waits for.
        """
        graph = torch.cuda.CUDAGraph()
        # "thread_local": calls of other threads, such as hardware monitors, do not invalidate the capture.
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
class _Recording:
    """A recorded window: the tensors that hold its batch, and its replay."""

    inputs: Nested
    targets: Nested
    replay: Callable[[], tuple[WindowResult, list[tuple[Any, Nested]]]]


class GraphedWindow:
    """`Window.backward` that replays a recording where there is one.

    The first windows of a kind (samples, steps, shapes) run eagerly, the next is recorded. Windows with
    `Window.after_micro_batch` hooks and kinds beyond the first 16 always run eagerly. If a gradient,
    parameter or buffer was replaced or a module changed its mode, the window runs eagerly and all recordings
    are discarded; so zero gradients in place, with `zero_grad(set_to_none=False)`. The memory of the largest
    recorded window is not released.

    Args:
        window: of one process, on a GPU, without fp32 buffers.
        recorder: the same for this and for the `GraphedStep`.

    Raises:
        ValueError: for a window that cannot be recorded.
    """

    def __init__(self, window: Window, recorder: GraphRecorder) -> None:
        if window.sync.ranks.size > 1 or window.sync.sharded or window.fp32_buffers:
            raise ValueError("a window of one process, without fp32 buffers, is recorded")
        if window_norms(window.model):
            raise ValueError(
                "norms over the window make passes of other lengths first, which is no one graph"
            )
        self.window = window
        self.recorder = recorder
        window.sync.keeps_gradients = True
        self._counts: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, _Recording] = {}
        parts = [part for part in (window.model, window.loss) if isinstance(part, nn.Module)]
        self._modules = [module for part in parts for module in part.modules()]
        self._loss_parameters = [*window.loss.parameters()] if isinstance(window.loss, nn.Module) else []
        # `_state` at the recording, and after the last eager window.
        self._recorded_state: Hashable = None
        self._eager_state: Hashable = None
        self._moved_in_a_row = 0

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
        """As `Window.backward`. Later windows overwrite neither the result nor what `observe` was given.

        Raises:
            ValueError: for a list of micro-batches, whose memory another window's would not have.
        """
        if targets is None:
            raise ValueError("backward: a graph is recorded of a whole batch; give inputs and targets")
        window = self.window
        steps = window.steps if steps is None else steps
        options: dict[str, Any] = {"steps": steps, "samples": samples, "weight": weight}
        if window.after_micro_batch:
            return window.backward(inputs, targets, **options, observe=observe)
        kind = (*options.values(), observe is not None, _signature(inputs), _signature(targets))
        state = self._state()
        if state != self._recorded_state:
            self._recordings.clear()
        recording = self._recordings.get(kind)
        if recording is None:
            count = self._counts[kind] = self._counts.get(kind, 0) + 1
            moved = state != self._eager_state
            if count <= FIRST or len(self._recordings) >= MOST or moved:
                self._moved_in_a_row = self._moved_in_a_row + 1 if moved else 0
                if self._moved_in_a_row == IN_A_ROW:
                    warnings.warn(MOVED, stacklevel=2)
                result = window.backward(inputs, targets, **options, observe=observe)
                self._eager_state = self._state()
                return result
            recording = self._recordings[kind] = self._record(inputs, targets, options, observe is not None)
            self._recorded_state = state
        for given, held in ((inputs, recording.inputs), (targets, recording.targets)):
            for source, target in zip(tensors(given), tensors(held), strict=True):
                target.copy_(source)
        result, observed = recording.replay()
        if observe is not None:
            for outputs, targets_k in observed:
                observe(*pytree.tree_map_only(Tensor, torch.clone, (outputs, targets_k)))
        total = result.weight.clone() if isinstance(result.weight, Tensor) else result.weight
        terms = {name: term.clone() for name, term in result.terms.items()}
        return replace(result, loss=result.loss.clone(), weight=total, terms=terms)

    def _record(self, inputs: Nested, targets: Nested, options: dict[str, Any], observe: bool) -> _Recording:
        inputs, targets = map_tensors(torch.clone, inputs), map_tensors(torch.clone, targets)

        def window() -> tuple[WindowResult, list[tuple[Any, Nested]]]:
            observed: list[tuple[Any, Nested]] = []

            def keep(outputs: Any, targets_k: Nested) -> None:
                observed.append((pytree.tree_map_only(Tensor, Tensor.detach, outputs), targets_k))

            result = self.window.backward(inputs, targets, **options, observe=keep if observe else None)
            return result, observed

        before = self._state()
        buffers = [(m._buffers, name, buffer) for m in self._modules for name, buffer in m._buffers.items()]
        try:
            replay = self.recorder(window)
        finally:
            moved = self._state() != before
            for module_buffers, name, buffer in buffers if moved else ():
                module_buffers[name] = buffer
        if moved:
            raise RuntimeError("a forward pass replaces a buffer, and a graph works on the one it began with")
        return _Recording(inputs, targets, replay)

    def _state(self) -> Hashable:
        """The addresses of all tensors that a recorded window works on, and the mode of each module."""
        return (
            parameter_addresses(self.window),
            tuple([p.data_ptr() for p in self._loss_parameters]),
            tuple([b.data_ptr() for m in self._modules for b in m._buffers.values() if b is not None]),
            tuple([m.training for m in self._modules]),
        )


class GraphedStep:
    """`OptimizerStep` that replays a recording where there is one.

    Learning rates become tensors on the device, which schedules fill. An optimizer that cannot be recorded
    (`can_be_recorded`) steps eagerly. `recorder` is that of the `GraphedWindow`.
    """

    def __init__(self, step: OptimizerStep, recorder: GraphRecorder) -> None:
        self.step = step
        self.recorder = recorder
        self._count = 0
        self._settings: Hashable = None
        self._state: Any = None
        self._rates: list[Tensor] = []
        self._recordings: dict[bool, Callable[[], StepResult]] = {}

    def __call__(self, want_norm: bool = False) -> StepResult:
        """As `OptimizerStep`. The next step does not overwrite the result."""
        if not can_be_recorded(self.step):
            return self.step(want_norm)
        optimizer = self.step.optimizer
        rates = rates_to_device(optimizer)
        settings = parameter_addresses(self.step.window), optimizer_settings(optimizer)
        # By identity: `load_state_dict` makes a new state, even of equal values.
        same = optimizer.state is self._state and [id(r) for r in rates] == [id(r) for r in self._rates]
        if not same or settings != self._settings:
            self._recordings.clear()
            self._settings, self._state, self._rates, self._count = settings, optimizer.state, rates, 0
        self._count += 1
        if self._count <= FIRST:
            return self.step(want_norm)
        replay = self._recordings.get(want_norm)
        if replay is None:
            replay = self._recordings[want_norm] = self.recorder(lambda: self.step(want_norm))
        result = replay()
        return StepResult(*(None if t is None else t.clone() for t in (result.norm, result.overflow)))


def parameter_addresses(window: Window) -> tuple[Hashable, ...]:
    """The addresses of parameters and gradients, and which parameters are trained."""
    return tuple(
        (p.data_ptr(), p.requires_grad, 0 if p.grad is None else p.grad.data_ptr())
        for p in window.model.parameters()
    )


def optimizer_settings(optimizer: torch.optim.Optimizer) -> tuple[Hashable, ...]:
    """What a recorded step cannot change of its optimizer: all settings but the learning rates."""
    return tuple(
        (key, id(value) if isinstance(value, Tensor) else value)
        for group in optimizer.param_groups
        for key, value in group.items()
        if key not in ("params", "lr")
    )


def can_be_recorded(step: OptimizerStep) -> bool:
    """Whether all of the step happens on the device, whatever the gradient.

    True for torch's fused optimizers, with `capturable` if they have it, on parameters below fp64.
    """
    if step.window.loss_scale is not None and not step.skips_on_device:
        return False
    # A fused kernel takes the learning rate from an fp32 tensor, which rounds the rate of an fp64 update.
    return all(
        group.get("fused")
        and group.get("capturable", True)
        and all(p.dtype is not torch.float64 for p in group["params"])
        for group in step.optimizer.param_groups
    )


def rates_to_device(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Replaces learning rates that are numbers by fp32 tensors of shape (), and returns all rates."""
    for group in optimizer.param_groups:
        device = group["params"][0].device
        rate = group["lr"]
        if not isinstance(rate, Tensor) or rate.device != device:
            group["lr"] = torch.full((), float(rate), dtype=torch.float32, device=device)
    return [group["lr"] for group in optimizer.param_groups]


def rates_as_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of an optimizer's `state_dict` in which learning rates are numbers, not tensors."""
    groups = [
        {key: float(value) if key == "lr" else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


def _signature(batch: Nested) -> tuple[Hashable, ...]:
    return tuple((tuple(t.shape), t.dtype, t.device) for t in tensors(batch))
