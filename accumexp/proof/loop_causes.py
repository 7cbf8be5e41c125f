"""Causes of a wrong gradient in what a loop makes of its samples before the model receives them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .certificate import Cause
from .float64 import DOUBLE
from .module_tracker import ModuleTracker
from .observation import observe
from .problem import Problem, TrainingState, WholeBatch, cast
from .ranks import all_gather
from .sample_ids import SampleIds

IN_THE_MODEL = "do it in the model's forward, where the larger batch does it too, or before certify's batch"


class LoopDraws(TorchDispatchMode):
    """While active, records the operators that draw before the window's first forward pass.

    Attributes:
        operators: their names, without that of a random order.
    """

    def __init__(self, modules: ModuleTracker) -> None:
        super().__init__()
        self.modules = modules
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if torch.Tag.nondeterministic_seeded in func.tags and name != "randperm" and not self.modules.samples:
            self.operators.add(name)
        return func(*args, **(kwargs or {}))


def loop_causes(problem: Problem, batch: WholeBatch) -> list[Cause]:
    """The cause if the model receives other rows than the batch's. A collective call."""
    state = TrainingState(replace(problem, fixed_draws=False), DOUBLE)
    batch = cast(batch, DOUBLE)
    modules = ModuleTracker(state.inner, SampleIds(batch[0], None, batch[1]))
    with modules.hooks, LoopDraws(modules) as draws:
        observation = observe(state, batch)
    changed = any(numbers is None for each in all_gather(observation.micro_batches) for numbers in each)
    operators = sorted(set().union(*all_gather(draws.operators)))
    if not changed:
        return []
    if operators:
        names = ", ".join(operators)
        reason = f"the loop itself draws ({names}), and its model receives rows that are not in the batch"
        return [Cause("draws of the loop", "", reason, math.nan, "", IN_THE_MODEL)]
    reason = "the loop changes its samples: the model receives rows that are not in the batch"
    return [Cause("other inputs", "", reason, math.nan, "", IN_THE_MODEL)]
