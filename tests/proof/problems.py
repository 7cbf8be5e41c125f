"""The problem that a loop is certified on, for tests of the proof's own parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from accumexp.proof.problem import Problem

from .wrong_loops import STEPS, right


def problem_of(model: nn.Module, loss: Any, batch: Any, steps: int = STEPS) -> Problem:
    return Problem(right, model, loss, [batch], steps, lambda p: torch.optim.SGD(p, lr=0.1))
