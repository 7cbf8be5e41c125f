"""The window on a GPU: laws 1, 6, 7 and 9, nccl, and memory that runs out; skipped without one."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from accumexp.accum import (
    LossScale,
    OptimizerStep,
    OutOfMemory,
    Recovery,
    Window,
    data_parallel,
    fully_sharded,
    rank_share,
)
from accumexp.models import LeNet5
from accumexp.training.noise_scale import NoiseScale

from ..support.noise import look
from ..support.ranks import on_ranks
from ..support.reference import gradients, larger_batch_gradient, relative_error

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


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_law_9_a_loss_scaled_update_with_a_fused_optimizer_never_waits(make: Any) -> None:
    model = LeNet5().cuda()
    images = torch.randn(64, 1, 32, 32, device="cuda")
    labels = torch.randint(0, 10, (64,), device="cuda")
    options: dict[str, Any] = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(model.parameters(), lr=0.01, fused=True, **options)
    scale = LossScale(device="cuda")
    window = Window(model, nn.CrossEntropyLoss(), 4, autocast=torch.float16, loss_scale=scale)
    step = OptimizerStep(window, optimizer, clip_norm=1.0)
    window.backward(images, labels)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            optimizer.zero_grad()
            window.backward(images, labels)
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(scale.skipped) == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_law_6_a_real_fp16_overflow_leaves_weights_and_momentum(fused: bool, first: int) -> None:
    torch.manual_seed(0)
    model = LeNet5().cuda()
    images = torch.randn(64, 1, 32, 32, device="cuda")
    labels = torch.randint(0, 10, (64,), device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=fused)
    scale = LossScale(2.0**8, min_scale=1.0, device="cuda")
    window = Window(model, nn.CrossEntropyLoss(), 4, autocast=torch.float16, loss_scale=scale)
    step = OptimizerStep(window, optimizer)
    for _ in range(first):
        window.backward(images, labels)
        step()
    scale.scale.fill_(2.0**40)
    before = [p.detach().clone() for p in model.parameters()]
    kept = [optimizer.state[p].get("momentum_buffer") for p in model.parameters()]
    kept = [None if buffer is None else buffer.clone() for buffer in kept]
    optimizer.zero_grad()
    window.backward(images, labels)
    result = step(want_norm=True)
    assert result.overflow is not None and bool(result.overflow)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    for p, buffer in zip(model.parameters(), kept, strict=True):
        now = optimizer.state[p].get("momentum_buffer")
        assert (now is None or not now.any()) if buffer is None else torch.equal(now, buffer)
    assert float(scale.scale) == 2.0**39


@pytest.mark.parametrize("scaled", [False, True])
def test_law_9_an_observer_of_gradient_noise_never_waits(scaled: bool) -> None:
    model = LeNet5().cuda()
    scale = LossScale(2.0**10, device="cuda") if scaled else None
    window = Window(model, nn.CrossEntropyLoss(), 4, loss_scale=scale)
    images = torch.randn(64, 1, 32, 32, device="cuda")
    labels = torch.randint(0, 10, (64,), device="cuda")
    callback = NoiseScale()
    look(callback, window, images, labels)
    callback.watch(window)
    torch.cuda.set_sync_debug_mode("error")
    try:
        window.backward(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def lenet_over_nccl(how: str) -> dict[str, torch.Tensor]:
    """The gradient of LeNet-5 in fp64, 3 micro-batches a rank."""
    torch.manual_seed(0)
    model: Any = LeNet5().double().cuda()
    model = fully_sharded(model, torch.device("cuda")) if how == "sharded" else data_parallel(model)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(50, 1, 32, 32, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 10, (50,), generator=generator)
    parts = rank_share(50, 3, dist.get_rank(), dist.get_world_size())
    samples = [sample for part in parts for sample in part]
    window = Window(model, nn.CrossEntropyLoss(), 3)
    window.backward(images[samples].cuda(), labels[samples].cuda())
    gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).cpu() for n, g in gradients.items()}


@pytest.mark.parametrize("how", ["replicated", "sharded"])
def test_law_1_over_nccl(tmp_path: Path, how: str) -> None:
    torch.manual_seed(0)
    model = LeNet5().double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(50, 1, 32, 32, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 10, (50,), generator=generator)
    expected = larger_batch_gradient(model, nn.CrossEntropyLoss(), images, labels)
    for gradient in on_ranks(min(2, torch.cuda.device_count()), tmp_path, lenet_over_nccl, how, cuda=True):
        assert relative_error(gradient, expected) <= 1e-12


class Wide(nn.Module):
    """Saves 20 MiB a sample for its backward (fp32 and a mask of 4 Mi numbers), and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        wide = (inputs @ self.scale[:, None]).expand(-1, 2**22).exp().sin()
        return nn.functional.dropout(wide, 0.5).mean(1, keepdim=True)


def test_real_out_of_memory_gives_the_finer_windows_bits() -> None:
    """256 samples save 5 GiB for their backward; 3 GiB are available."""
    torch.manual_seed(0)
    inputs, targets = torch.rand(256, 8, device="cuda"), torch.rand(256, 1, device="cuda")
    model = Wide().cuda()
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    events: list[OutOfMemory] = []
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 3 * 2**30) / total)
    try:
        torch.manual_seed(1)
        result = Recovery(Window(model, nn.MSELoss(), 1), events.append).backward(inputs, targets)
        after = torch.cuda.get_rng_state()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result.steps == 2 ** len(events) >= 4
    gradient, model.scale.grad = model.scale.grad, None
    torch.manual_seed(1)
    Window(model, nn.MSELoss(), result.steps).backward(inputs, targets)
    assert gradient is not None and model.scale.grad is not None
    assert torch.equal(gradient, model.scale.grad)
    assert torch.equal(after, torch.cuda.get_rng_state())


def test_law_9_a_window_with_recovery_never_waits_for_the_device() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)).cuda()
    images, labels = torch.randn(64, 1, 8, 8, device="cuda"), torch.randint(0, 10, (64,), device="cuda")
    recovery = Recovery(Window(model, nn.CrossEntropyLoss(), 4))
    recovery.backward(images, labels)
    model.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        recovery.backward(images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
