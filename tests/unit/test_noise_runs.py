"""The gradient noise scale in a run: it changes no bit, is resumed, and refused where it cannot be told."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accumexp.accum import MicroBatch
from accumexp.environment.random_state import random_state
from accumexp.errors import UsageError
from accumexp.training.checkpoint import load, restore, save
from accumexp.training.noise_scale import NoiseScale
from accumexp.training.sample_noise_scale import SampleNoiseScale
from accumexp.training.trainer import Trainer
from accumexp.training.trainer_state import trainer_state

from ..support.experiments import trainer_of, weights
from ..support.noise import MICRO, NAMES, SAMPLE

KINDS = {"micro-batches": MICRO, "samples": SAMPLE}

STATEFUL = ["model.dropout=0.3", "optimizer=adamw", "accum.steps=3", "trainer.log_every=2"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [(), ("data.resident=false", "data.workers=1"), ("model._target_=tests.unit.test_noise_runs.Called",)],
)
def test_a_run_with_a_noise_scale_has_the_bits_of_one_without(kind: str, options: tuple[str, ...]) -> None:
    runs = []
    for callback in ((), (KINDS[kind],)):
        trainer, memory = trainer_of(*STATEFUL, *options, *callback, "trainer.max_updates=13")
        trainer.fit()
        runs.append((weights(trainer), random_state(), memory.series("train/loss")))
    assert memory.series("train/noise_scale")
    assert all(torch.equal(value, runs[1][0][name]) for name, value in runs[0][0].items())
    assert torch.equal(runs[0][1]["torch"], runs[1][1]["torch"])
    assert runs[0][1]["python"] == runs[1][1]["python"]
    assert runs[0][2] == runs[1][2]


@pytest.mark.parametrize("kind", KINDS)
def test_law_8_a_resumed_run_logs_the_same_noise_scale(kind: str, tmp_path: Path) -> None:
    options = [*STATEFUL, KINDS[kind], *(["+callbacks.noise.every=2"] if kind == "samples" else [])]
    whole, memory = trainer_of(*options, "trainer.max_updates=16")
    whole.fit()
    first, _ = trainer_of(*options, "trainer.max_updates=6")  # of which the third point is the last
    first.fit()
    path = tmp_path / "update-00000006.pt"
    save(path, {**trainer_state(first), "random": random_state()})
    second, after = trainer_of(*options, "trainer.max_updates=16")
    restore(second, load(path), path)
    second.fit()
    for name in NAMES:
        expected = [(update, value) for update, value in memory.series(name) if update > 6]
        assert len(expected) >= 2 and after.series(name) == expected


def test_points_are_smoothed_apart_and_divided_last() -> None:
    callback = NoiseScale(decay=0.5)
    assert callback.count(2.0, 10.0)["train/noise_scale"] == pytest.approx(5.0)
    points = callback.count(1.0, 40.0)
    # Weights 1/4 and 1/2 of the older and the newer, over their sum.
    square, variance = (2.0 + 2 * 1.0) / 3, (10.0 + 2 * 40.0) / 3
    assert [points[name] for name in NAMES] == pytest.approx([variance / square, variance, square])
    assert callback.count(-40.0, 1.0) == {} and callback.estimates == 3
    assert callback.count(math.nan, 1.0) == {} and callback.estimates == 3
    assert callback.count(400.0, 1.0).keys() == set(NAMES)
    assert callback.count(400.0, -400.0) == {} and callback.estimates == 5


def test_only_windows_that_are_published_are_observed_and_nothing_is_kept() -> None:
    trainer, memory = trainer_of(MICRO, "accum.steps=4", "trainer.log_every=5", "trainer.max_updates=11")
    kept, observed = [], []

    class Watch(NoiseScale):
        def update_end(self, trainer: Trainer) -> None:
            kept.append(len(self._before) + len(self._rows) + len(trainer.window.after_micro_batch))

        def _observe(self, micro: MicroBatch) -> None:
            observed.append(trainer.progress.update + 1)
            super()._observe(micro)

    trainer.callbacks["noise"] = Watch()
    trainer.fit()
    # The epoch's last window has 13 samples, in one micro-batch: it tells nothing, unless it has to be split.
    assert observed == [5] * 4 + [10] * 4 + [11]
    assert kept == [0] * 11
    assert memory.series("train/gradient_variance")


def test_one_micro_batch_is_too_few_and_it_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    trainer, memory = trainer_of(MICRO, "accum.steps=1", "trainer.max_updates=25")
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    messages = [record.message for record in caplog.records if "noise_scale" in record.message]
    assert len(messages) == 1 and "accum.steps=2 or more" in messages[0]
    assert memory.series("train/noise_scale") == []


class Normed(nn.Module):
    def __init__(self, num_classes: int, inputs: int, **other: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(inputs), nn.Linear(inputs, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Counted(Normed):
    """Keeps a running sum in a buffer, in place."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.layers[1] = nn.Identity()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.seen += images.detach().mean()
        return super().forward(images)


class Called(Counted):
    """Counts its calls in a buffer."""

    def forward(self, images: Tensor) -> Tensor:
        self.seen += 1
        return self.layers(images)


@pytest.mark.parametrize("training", [False, True])
def test_the_trial_on_single_samples_leaves_the_model_as_it_was(training: bool) -> None:
    trainer, _ = trainer_of()
    trainer.model.train(training)
    SampleNoiseScale().check(trainer, "callbacks.noise")
    assert all(module.training is training for module in trainer.model.modules())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            [SAMPLE, "model._target_=tests.unit.test_noise_runs.Normed"],
            "BatchNorm1d layers.1 takes the batch's",
        ),
        ([SAMPLE, "model._target_=tests.unit.test_noise_runs.Counted"], "vmap cannot run this model"),
        ([SAMPLE, "+callbacks.noise.samples=1"], "samples=1: a variance needs at least 2"),
        ([SAMPLE, "+callbacks.noise.chunk=0"], "chunk=0"),
        ([MICRO, "+callbacks.noise.decay=1"], "decay=1: from 0 to below 1"),
        ([MICRO, "accum.fp32_buffers=true"], "accum.fp32_buffers=true"),
        ([MICRO, MICRO.replace("noise._", "twice._")], "another callback logs train/noise_scale"),
    ],
)
def test_what_cannot_be_estimated_is_refused_in_one_line(overrides: list[str], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        trainer_of(*overrides)
    assert str(refused.value).startswith("callbacks.noise") and says in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
