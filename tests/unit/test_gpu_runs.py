"""Runs on a GPU: data, resuming, recorded windows, noise scale, auto steps; skipped without one."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from accumexp.config.loading import with_steps
from accumexp.data import ResidentBatches
from accumexp.environment.random_state import random_state
from accumexp.environment.ranks import RankInfo
from accumexp.errors import UsageError
from accumexp.models import LeNet5
from accumexp.plan.auto_steps import measure_steps
from accumexp.plan.planner import Planner
from accumexp.plan.trial_run import trial_run
from accumexp.training.checkpoint import load, restore, save
from accumexp.training.experiment import Experiment
from accumexp.training.metrics_sink import MemoryMetricsSink
from accumexp.training.trainer_state import trainer_state

from ..support.experiments import composed, trainer_of, weights
from ..support.reference import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


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
    model = ["model._target_=tests.unit.test_gpu_runs.Waits", "trainer.graph=true"]
    with pytest.raises(UsageError, match="Waits cannot be recorded as a graph"):
        trainer_of(*GRAPHED, *model)
    trainer, _ = trainer_of(*GRAPHED, model[0])  # the failed capture leaves the device usable
    trainer.fit()


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
