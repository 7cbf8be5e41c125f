"""Tests that need a GPU; skipped without one."""

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
from accumexp.config.loading import with_steps
from accumexp.data import ResidentBatches
from accumexp.environment.random_state import random_state
from accumexp.environment.ranks import RankInfo
from accumexp.errors import UsageError
from accumexp.models import LeNet5
from accumexp.plan.auto_steps import measure_steps
from accumexp.plan.planner import Planner
from accumexp.plan.trial_run import trial_run
from accumexp.proof import Scaling, certify
from accumexp.training.checkpoint import load, restore, save
from accumexp.training.experiment import Experiment
from accumexp.training.metrics_sink import MemoryMetricsSink
from accumexp.training.noise_scale import NoiseScale
from accumexp.training.trainer_state import trainer_state

from ..support.experiments import composed, trainer_of, weights
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


def test_data_is_resident_and_weights_equal_those_of_a_cpu_run() -> None:
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
    save(path, {**trainer_state(first), "random": random_state()})
    second, _ = trainer_of(*overrides, "trainer.max_updates=12")
    restore(second, load(path), path)
    second.fit()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


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


GRAPHED = [
    *("device=cuda", "precision=fp32", "model=lenet5", "accum.steps=4", "data.batch_size=100"),
    *(
        "trainer.max_updates=40",
        "trainer.log_every=4",
        "scheduler=warmup_cosine",
        "scheduler.warmup_updates=5",
    ),
]


@pytest.mark.parametrize(
    "options",
    [
        ["trainer.clip_norm=0.5"],
        ["model=mlp", "model.dropout=0.2", "optimizer=adamw"],
        ["precision=fp16", "accum.loss_scale=dynamic", "accum.growth_interval=3"],
        ["precision=bf16", "optimizer=rmsprop"],
    ],
)
def test_a_replayed_run_is_the_eager_run(options: list[str]) -> None:
    plain, expected = trainer_of(*GRAPHED, *options)
    plain.fit()
    replayed, recorded = trainer_of(*GRAPHED, *options, "trainer.graph=true")
    replayed.fit()
    assert relative_error(weights(replayed), weights(plain)) <= (
        1e-2 if "precision=bf16" in options else 1e-3
    )
    for key in ("train/loss", "train/lr", "train/accuracy", "eval/loss"):
        assert dict(recorded.series(key)) == pytest.approx(dict(expected.series(key)), rel=1e-2, abs=1e-2), (
            key
        )
    assert recorded.series("accum/skipped_windows") == expected.series("accum/skipped_windows")


def test_law_9_replayed_updates_never_wait() -> None:
    trainer, _ = trainer_of(*GRAPHED, "trainer.graph=true", "trainer.clip_norm=1", "trainer.log_every=1000")
    batches = list(trainer.splits.train.epoch(0))
    full = [batch for batch in batches if batch.total == 100]
    for batch in full[:5]:
        trainer.update(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in full[5:10]:
            trainer.update(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Waits(LeNet5):
    """Reads its inputs on the host."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) * (2.0 if float(images.sum()) > 1e9 else 1.0)


def test_a_model_that_waits_for_the_device_cannot_be_recorded() -> None:
    model = ["model._target_=tests.unit.test_gpu.Waits", "trainer.graph=true"]
    with pytest.raises(UsageError, match="Waits cannot be recorded as a graph"):
        trainer_of(*GRAPHED, *model)
    trainer, _ = trainer_of(*GRAPHED, model[0])  # the failed capture leaves the device usable
    trainer.fit()


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


@pytest.mark.parametrize("kind", ["noise.NoiseScale", "sample_noise.SampleNoiseScale"])
def test_the_noise_scale_on_the_gpu_is_the_cpus_and_changes_no_bit(kind: str) -> None:
    options = ["accum.steps=4", "trainer.log_every=2", "trainer.max_updates=6"]
    callback = f"+callbacks.noise._target_=accumexp.{kind}"
    variances = {}
    for device in ("cpu", "cuda"):
        trainer, memory = trainer_of(f"device={device}", *options, callback)
        trainer.fit()
        variances[device] = [value for _, value in memory.series("train/gradient_variance")]
    assert variances["cuda"] == pytest.approx(variances["cpu"], rel=1e-6) and variances["cuda"]
    ends = []
    for extra in ((), (callback,)):
        trainer, _ = trainer_of("device=cuda", "model.dropout=0.3", *options, *extra)
        trainer.fit()
        ends.append((weights(trainer), torch.cuda.get_rng_state()))
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    assert torch.equal(ends[0][1], ends[1][1])


def test_fp16_reaches_fp32s_accuracy_on_digits() -> None:
    accuracy = {}
    for accum in ("standalone", "loss_scaled"):
        options = ["model=lenet5", "precision=null", f"accum={accum}", "accum.steps=4", "trainer.epochs=15"]
        trainer, _ = trainer_of("device=cuda", *options)
        trainer.fit()
        accuracy[accum] = trainer.evaluate("test")["test/accuracy"]
    assert abs(accuracy["standalone"] - accuracy["loss_scaled"]) <= 0.02


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


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_auto_steps_stay_below_the_limit_on_the_gpu(share: float) -> None:
    overrides = ["device=cuda", "accum.steps=auto", "data.batch_size=96", "data.eval_batch_size=8"]
    with trial_run(composed(*overrides)) as trial:
        planner = Planner(trial)
        most, least = planner.predicted_peak(1), planner.predicted_peak(48)
        point = planner.measure(2)
        assert point.measured and abs(point.predicted / point.measured - 1) < 0.1
    limit = int(least + share * (most - least))
    config = composed(*overrides, f"accum.memory_limit={limit}")
    point, _ = measure_steps(config, RankInfo())
    chosen = with_steps(config, point.steps)
    chosen.trainer.max_updates = 3
    chosen.callbacks.clear()
    gc.collect()  # what earlier tests have left would count
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    Experiment.build(chosen).trainer(MemoryMetricsSink()).fit()
    assert torch.cuda.max_memory_allocated() <= limit


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
