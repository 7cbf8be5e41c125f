"""One optimizer's step for many replicas, where their optimizers do the same to every element."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, optim

from .replica_window import ReplicaWindow
from .step import OptimizerStep, StepResult, give_momentum

# What an element becomes depends on it, its gradient and its state alone, so a stack of parameters is stepped
# as each of them is.
ELEMENTWISE: tuple[type[optim.Optimizer], ...] = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax),
    *(optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.Rprop),
)
# What these keep once for a parameter and not for each of its elements.
COUNTS = {"step", "mu_product"}


class ReplicaStep:
    """Clips and steps all replicas at once; each optimizer's state are views into the one that steps.

    Where that would not be what each replica's own step does (another optimizer, a loss scale that may skip
    one of them, a learning rate that differs), every replica is left to step by itself.

    Args:
        steps: of the replicas in `window`, with the same settings.
    """

    def __init__(self, window: ReplicaWindow, steps: Sequence[OptimizerStep]) -> None:
        self.window = window
        self.steps = list(steps)
        self._joint: optim.Optimizer | None = None
        self._shared: list[int] = []
        kinds = {type(step.optimizer) for step in steps}
        scaled = any(step.window.loss_scale is not None for step in steps)
        self._able = len(kinds) == 1 and kinds <= set(ELEMENTWISE) and not scaled and not self._hooked()
        self._join()

    def keep(self, which: Sequence[int]) -> None:
        """Goes on with the replicas `which` alone, as its window has done before."""
        for r in set(range(len(self.steps))) - set(which):
            _map_state(self.steps[r].optimizer, lambda key, value: value.clone())
        self.steps = [self.steps[r] for r in which]
        if self.steps:
            self._join()

    def __call__(self, want_norm: bool = False) -> list[StepResult] | None:
        """What each replica's step did; None if they have yet to step by themselves."""
        if self._joint is None or not self._settled(self._joint):
            return None
        clip_norm = self.steps[0].clip_norm
        norms: Sequence[Tensor | None] = [None] * len(self.steps)
        if want_norm or clip_norm is not None:
            gradients = [p.grad for p in self.window.parameters if p.grad is not None]
            flat = [g.reshape(len(g), -1) for g in gradients]
            each = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in flat])
            norm = torch.linalg.vector_norm(each, dim=0)
            # Who wants to know them reads them all in one wait for the device.
            norms = (norm.cpu() if want_norm else norm).unbind()
            if clip_norm is not None:
                # As OptimizerStep has it, for each replica.
                factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
                for gradient in gradients:
                    gradient.mul_(factor.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1)))
        give_momentum(self._joint)
        self._joint.step()
        self._share(self._joint)
        return [StepResult(norm, None) for norm in norms]

    def _join(self) -> None:
        """The optimizer of the stacks, from what the replicas' own have come to."""
        self._joint = None
        if not self._able:
            return
        stacks = self.window.stacks()
        optimizers = [step.optimizer for step in self.steps]
        joint = copy.copy(optimizers[0])
        joint.state, groups = defaultdict(dict), []
        for group in optimizers[0].param_groups:
            groups.append({**group, "params": [stacks[parameter] for parameter in group["params"]]})
        joint.param_groups = groups
        for stack, own in self._pairs(joint):
            states = [o.state[p] for o, p in zip(optimizers, own, strict=True) if p in o.state]
            if len(states) == len(own) and states[0]:
                joint.state[stack] = {key: _stacked(key, [s[key] for s in states]) for key in states[0]}
        self._joint = joint
        self._shared = []
        self._share(joint)

    def _settled(self, joint: optim.Optimizer) -> bool:
        """Takes over what schedules have set.

        False, for good, if it is not the same for all replicas, or one's step has got hooks.
        """
        if self._hooked():
            self._part()
            return False
        every = [step.optimizer.param_groups for step in self.steps]
        for k, group in enumerate(joint.param_groups):
            first, *others = (groups[k] for groups in every)
            for key, value in first.items():
                if key == "params":
                    continue
                if any(other[key] is not value and other[key] != value for other in others):
                    self._part()
                    return False
                group[key] = value
        return True

    def _hooked(self) -> bool:
        """Whether somebody wants to hear of a replica's own step."""
        optimizers = [step.optimizer for step in self.steps]
        return any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in optimizers)

    def _part(self) -> None:
        """Lets every replica's own optimizer go on, with counts of its own."""
        self._joint, self._able = None, False
        for step in self.steps:
            _map_state(step.optimizer, lambda key, value: value.clone() if key in COUNTS else value)

    def _share(self, joint: optim.Optimizer) -> None:
        """Makes the optimizers' states those of `joint`, if it has made any since the last time."""
        made = [id(value) for state in joint.state.values() for value in state.values()]
        if made == self._shared:
            return
        self._shared = made
        for stack, own in self._pairs(joint):
            for key, value in joint.state.get(stack, {}).items():
                alike = key in COUNTS or not isinstance(value, Tensor)
                each = [value] * len(own) if alike else value.unbind()
                for step, parameter, part in zip(self.steps, own, each, strict=True):
                    step.optimizer.state[parameter][key] = part

    def _pairs(self, joint: optim.Optimizer) -> list[tuple[Tensor, list[Any]]]:
        """Each stack, and the replicas' parameters in it."""
        found = []
        for k, group in enumerate(joint.param_groups):
            every = [step.optimizer.param_groups[k]["params"] for step in self.steps]
            found += [
                (stack, list(own))
                for stack, own in zip(group["params"], zip(*every, strict=True), strict=True)
            ]
        return found


def _stacked(key: str, values: list[Any]) -> Any:
    first = values[0]
    if not isinstance(first, Tensor):
        return first
    return first.clone() if key in COUNTS else torch.stack(values)


def _map_state(optimizer: optim.Optimizer, change: Callable[[str, Tensor], Tensor]) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                state[key] = change(key, value)
