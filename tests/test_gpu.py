"""What only a GPU can show. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accumexp.accum import Window
from accumexp.checkpoint import load, restore, save
from accumexp.data import ResidentBatches
from accumexp.models import LeNet5
from accumexp.seeding import random_state

from .experiments import trainer_of, weights
from .reference import gradients, larger_batch_gradient, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_law_1_on_the_gpu_in_fp64(steps: int) -> None:
    torch.manual_seed(0)
    model = LeNet5().double().cuda()
    images = torch.randn(50, 1, 32, 32, dtype=torch.float64, device="cuda")
    labels = torch.randint(0, 10, (50,), device="cuda")
    expected = larger_batch_gradient(model, nn.CrossEntropyLoss(), images, labels)
    Window(model, nn.CrossEntropyLoss(), steps).backward(images, labels)
    assert relative_error(gradients(model), expected) <= 1e-12


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)])
@pytest.mark.parametrize("options", [{}, {"autocast": torch.bfloat16}, {"reduction": "sum"}])
def test_law_9_a_window_never_waits_for_the_device(loss: nn.Module, options: dict[str, Any]) -> None:
    model = LeNet5().cuda()
    images = torch.randn(64, 1, 32, 32, device="cuda")
    labels = torch.randint(0, 10, (64,), device="cuda")
    window = Window(model, loss, 4, **options)
    window.backward(images, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        window.backward(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_law_7_peak_memory_falls_with_the_micro_batch() -> None:
    peaks = {}
    model = LeNet5().cuda()
    images = torch.randn(4096, 1, 32, 32, device="cuda")
    labels = torch.randint(0, 10, (4096,), device="cuda")
    for steps in (1, 8):
        model.zero_grad()
        Window(model, nn.CrossEntropyLoss(), steps).backward(images, labels)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        Window(model, nn.CrossEntropyLoss(), steps).backward(images, labels)
        peaks[steps] = torch.cuda.max_memory_allocated() - before
    assert peaks[8] < peaks[1] / 6


def test_the_data_is_resident_and_the_weights_agree_with_the_cpus() -> None:
    finals = []
    for device in ("cpu", "cuda"):
        trainer, _ = trainer_of(
            f"device={device}", "accum.steps=3", "trainer.epochs=1", "data.batch_size=100"
        )
        assert isinstance(trainer.splits.train, ResidentBatches)
        assert next(trainer.splits.train.epoch(0)).indices.device.type == device
        trainer.fit()
        finals.append({name: value.cpu() for name, value in weights(trainer).items()})
    assert relative_error(finals[1], finals[0]) <= 1e-9


def test_law_8_on_the_gpu_with_dropout(tmp_path: Path) -> None:
    overrides = ["device=cuda", "precision=fp32", "model.dropout=0.2", "optimizer=adamw", "accum.steps=4"]
    whole, _ = trainer_of(*overrides, "trainer.max_updates=12")
    whole.fit()
    first, _ = trainer_of(*overrides, "trainer.max_updates=7")
    first.fit()
    path = tmp_path / "update-00000007.pt"
    save(path, {**first.state_dict(), "random": random_state()})
    second, _ = trainer_of(*overrides, "trainer.max_updates=12")
    restore(second, load(path), path)
    second.fit()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name
