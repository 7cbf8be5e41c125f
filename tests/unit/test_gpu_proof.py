"""Certificates of loops on a GPU; skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from accumexp.accum import LossScale, OptimizerStep, Window
from accumexp.proof import Scaling, certify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("how", ["fp32", "bf16", "fp16", "fp64"])
def test_a_correct_window_on_a_gpu_is_certified(how: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).to("cuda")
    batch = torch.randn(32, 1, 8, 8, device="cuda"), torch.randint(0, 5, (32,), device="cuda")
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(how)
    scales: dict[nn.Module, LossScale] = {}

    def train_window(
        model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, steps: int
    ) -> torch.Tensor:
        scale = scales.setdefault(model, LossScale(2.0**12, device="cuda")) if how == "fp16" else None
        window = Window(model, nn.CrossEntropyLoss(), steps, autocast=autocast, loss_scale=scale)
        optimizer.zero_grad()
        result = window.backward(*batch, steps=min(steps, len(batch[1])))
        OptimizerStep(window, optimizer)()
        return result.loss

    certificate = certify(
        train_window,
        model,
        nn.CrossEntropyLoss(),
        batch,
        4,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, fused=True),
        precision=torch.float64 if how == "fp64" else torch.float32,
        autocast=autocast,
        loss_scale=Scaling() if how == "fp16" else None,
        updates=8,
    )
    assert str(certificate) == "proved", certificate.failed


def test_a_certificate_on_a_gpu_names_batch_statistics_and_holds_dropout_fixed() -> None:
    layers = [nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 5)]
    batch = torch.randn(32, 1, 8, 8, device="cuda"), torch.randint(0, 5, (32,), device="cuda")

    def train_window(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, steps: int) -> None:
        optimizer.zero_grad()
        Window(model, nn.CrossEntropyLoss(), steps).backward(*batch, steps=min(steps, len(batch[1])))
        optimizer.step()

    normed = nn.Sequential(*layers).to("cuda")
    assert "2 (BatchNorm1d)" in str(certify(train_window, normed, nn.CrossEntropyLoss(), batch, 4, updates=2))
    dropped = nn.Sequential(*layers[:2], *layers[3:]).to("cuda")
    certificate = certify(train_window, dropped, nn.CrossEntropyLoss(), batch, 4, updates=4)
    assert str(certificate) == "proved up to dropout draws (2 (Dropout))"
