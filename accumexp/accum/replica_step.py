"""One optimizer step for many replicas, for optimizers that update every element by itself."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, optim

from .replica_window import ReplicaWindow
from .step import OptimizerStep, StepResult, give_momentum

# Their update of an element depends on the element, its gradient and its state alone.
ELEMENTWISE: tuple[type[optim.Optimizer], ...] = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax),
    *(optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.Rprop),
)
# State that these optimizers keep per parameter instead of per element.
COUNTS = {"step", "mu_product"}


class ReplicaStep:
    """Clips and steps all replicas at once, with one optimizer over the stacked parameters.

    The states of the replicas' own optimizers are views into the stacked state. Each replica steps by itself
    with another optimizer, a loss scale, unequal learning rates or step hooks.

    Args:
        steps: of the replicas in `window`, with the same settings.
    """

    def __init__(self, window: ReplicaWindow, steps: Sequence[OptimizerStep]) -> None:
        self.window = window
        self.steps = list(steps)
        self._stacked: optim.Optimizer | None = None
        self._shared: list[int] = []  # the ids of the stacked state of which the replicas have views
        kinds = {type(step.optimizer) for step in steps}
        scaled = any(step.window.loss_scale is not None for step in steps)
        self._can_stack = len(kinds) == 1 and kinds <= set(ELEMENTWISE) and not scaled and not self._hooked()
        self._stack()

    def keep(self, which: Sequence[int]) -> None:
        """Keeps only the replicas `which`, after `ReplicaWindow.keep` with the same."""
        for r in set(range(len(self.steps))) - set(which):
            _map_state(self.steps[r].optimizer, lambda key, value: value.clone())
        self.steps = [self.steps[r] for r in which]
        if self.steps:
            self._stack()

    def __call__(self, want_norm: bool = False) -> list[StepResult] | None:
        """Each replica's result, or None if the replicas must step by themselves."""
        if self._stacked is None or not self._update_settings(self._stacked):
            return None
        clip_norm = self.steps[0].clip_norm
        norms: Sequence[Tensor | None] = [None] * len(self.steps)
        if want_norm or clip_norm is not None:
            gradients = [p.grad for p in self.window.parameters if p.grad is not None]
            each = torch.stack([torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients])
            norm = torch.linalg.vector_norm(each, dim=0)
            # On the host, so that reading all of them waits for the device once.
            norms = (norm.cpu() if want_norm else norm).unbind()
            if clip_norm is not None:
                # As in OptimizerStep, for each replica.
                factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
                for gradient in gradients:
                    gradient.mul_(factor.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1)))
        clip_value = self.steps[0].clip_value
        if clip_value is not None:
            for p in self.window.parameters:
                if p.grad is not None:
                    p.grad.clamp_(-clip_value, clip_value)
        give_momentum(self._stacked)
        self._stacked.step()
        self._share(self._stacked)
        return [StepResult(norm, None) for norm in norms]

    def _stack(self) -> None:
        """Makes the optimizer of the stacks, with the stacked states of the replicas' own."""
        self._stacked = None
        if not self._can_stack:
            return
        stacks = self.window.stacks()
        optimizers = [step.optimizer for step in self.steps]
        stacked = copy.copy(optimizers[0])
        stacked.state = defaultdict(dict)
        stacked.param_groups = [
            {**group, "params": [stacks[parameter] for parameter in group["params"]]}
            for group in optimizers[0].param_groups
        ]
        for stack, parameters in self._pairs(stacked):
            states = [o.state[p] for o, p in zip(optimizers, parameters, strict=True) if p in o.state]
            if len(states) == len(parameters) and states[0]:
                stacked.state[stack] = {
                    key: _stack_values(key, [state[key] for state in states]) for key in states[0]
                }
        self._stacked = stacked
        self._shared = []
        self._share(stacked)

    def _update_settings(self, stacked: optim.Optimizer) -> bool:
        """Copies the groups' settings, which schedules change, to the optimizer of the stacks.

        Returns:
            False, from then on, if they are not the same for all replicas or a replica's step has hooks.
        """
        same = not self._hooked()
        per_replica = [step.optimizer.param_groups for step in self.steps]
        for k, group in enumerate(stacked.param_groups):
            first, *others = (groups[k] for groups in per_replica)
            for key, value in first.items():
                if key != "params":
                    same = same and all(other[key] is value or other[key] == value for other in others)
                    group[key] = value
        if not same:
            self._stacked, self._can_stack = None, False
            for step in self.steps:
                _map_state(step.optimizer, lambda key, value: value.clone() if key in COUNTS else value)
        return same

    def _hooked(self) -> bool:
        """Whether a replica's optimizer has step hooks, which the optimizer of the stacks would not call."""
        optimizers = [step.optimizer for step in self.steps]
        return any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in optimizers)

    def _share(self, stacked: optim.Optimizer) -> None:
        """Makes the replicas' states views into `stacked`'s, if it has new state tensors."""
        ids = [id(value) for state in stacked.state.values() for value in state.values()]
        if ids == self._shared:
            return
        self._shared = ids
        for stack, parameters in self._pairs(stacked):
            for key, value in stacked.state.get(stack, {}).items():
                common = key in COUNTS or not isinstance(value, Tensor)
                parts = [value] * len(parameters) if common else value.unbind()
                for step, parameter, part in zip(self.steps, parameters, parts, strict=True):
                    step.optimizer.state[parameter][key] = part

    def _pairs(self, stacked: optim.Optimizer) -> list[tuple[Tensor, list[Any]]]:
        """Each stack with the replicas' parameters in it."""
        pairs = []
        for k, group in enumerate(stacked.param_groups):
            replicas = zip(*(step.optimizer.param_groups[k]["params"] for step in self.steps), strict=True)
            pairs += zip(group["params"], map(list, replicas), strict=True)
        return pairs


def _stack_values(key: str, values: list[Any]) -> Any:
    first = values[0]
    if not isinstance(first, Tensor):
        return first
    return first.clone() if key in COUNTS else torch.stack(values)


def _map_state(optimizer: optim.Optimizer, change: Callable[[str, Tensor], Tensor]) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = change(key, value)
