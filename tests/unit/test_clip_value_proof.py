"""`clip_value` in a certificate: the larger batch is clamped too, and another clamp is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accumexp.accum import OptimizerStep, Window
from accumexp.proof import certify


@pytest.mark.parametrize(("value", "proved"), [(0.02, True), (0.04, False), (None, False)])
def test_a_certificate_clamps_the_larger_batch_as_the_loop_does(value: float | None, proved: bool) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    data = torch.randn(12, 6), torch.randint(3, (12,))

    def loop(model: nn.Module, optimizer: Any, batch: Any, steps: int) -> None:
        window = Window(model, nn.CrossEntropyLoss(), steps)
        optimizer.zero_grad()
        window.backward(*batch)
        OptimizerStep(window, optimizer, clip_value=0.02)()

    certificate = certify(loop, model, nn.CrossEntropyLoss(), [data], 4, clip_value=value, updates=5)
    assert certificate.proved is proved, certificate.causes
