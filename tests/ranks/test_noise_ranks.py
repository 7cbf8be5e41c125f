"""The gradient noise scale between real processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch import nn

from accumexp.accum import Window, rank_share
from accumexp.errors import UsageError
from accumexp.training.noise_scale import NoiseScale
from accumexp.training.sample_noise_scale import SampleNoiseScale

from ..support.noise import each_samples_gradient, flat_gradient, look, of_parts, smoothed
from ..support.ranks import on_ranks
from ..support.reference import classification, small_model
from .windows import own_part, wrapped


def on_a_rank(how: str, kind: str, samples: int, steps: int) -> tuple[float, float, float]:
    window = Window(wrapped(small_model(), how), nn.CrossEntropyLoss(), steps)
    inputs, targets, counted = own_part(classification(samples), steps)
    callback = NoiseScale() if kind == "micro-batches" else SampleNoiseScale()
    look(callback, window, inputs, targets, counted)
    return smoothed(callback)


@pytest.mark.parametrize("how", ["adding", "averaging"])
@pytest.mark.parametrize(("samples", "steps"), [(41, 3), (3, 3)])
def test_all_ranks_see_the_estimate_of_all_micro_batches_alike(
    how: str, samples: int, steps: int, tmp_path: Path
) -> None:
    """With 3 samples in 3 micro-batches the second rank has nothing but padding."""
    model, (inputs, targets) = small_model(), classification(samples)
    gradient, weight, alone = [], [], []
    for rank in range(2):
        for k, part in enumerate(rank_share(samples, steps, rank, 2)):
            if part:
                loss = nn.functional.cross_entropy(model(inputs[list(part)]), targets[list(part)])
                gradient.append(flat_gradient(model, loss))
                weight.append(len(part))
                alone.append(k < steps - 1)  # gradients are added in the last
    w, m, a = np.array(weight), np.stack(gradient), np.array(alone)
    whole = (w[:, None] * m).sum(0) / samples
    equations = [[w[a].sum(), a.sum()], [1.0, 1 / samples]]
    right_sides = [(w[a] * (m[a] ** 2).sum(1)).sum(), (whole**2).sum()]
    square, variance = np.linalg.solve(equations, right_sides)
    for estimate in on_ranks(2, tmp_path, on_a_rank, how, "micro-batches", samples, steps):
        assert estimate == pytest.approx((variance / square, variance, square), rel=1e-9)


@pytest.mark.parametrize(("samples", "ranks"), [(41, 2), (3, 1)])
def test_the_ranks_samples_give_one_estimate(samples: int, ranks: int, tmp_path: Path) -> None:
    model, (inputs, targets) = small_model(), classification(samples)
    each = []
    for rank in range(ranks):  # of 3 samples the second rank has one, which tells nothing
        rows = [i for part in rank_share(samples, 1, rank, 2) for i in part]
        gradients = each_samples_gradient(model, inputs[rows], targets[rows])
        each.append(of_parts(gradients, [1.0] * len(rows), len(rows))[1:])
    variance, square = np.mean(each, 0)
    for estimate in on_ranks(2, tmp_path, on_a_rank, "adding", "samples", samples, 1):
        assert estimate == pytest.approx((variance / square, variance, square), rel=1e-9)


def refusals() -> list[str]:
    """What both say of a fully sharded model."""
    window = Window(wrapped(small_model(), "sharded"), nn.CrossEntropyLoss(), 2)
    trainer: Any = SimpleNamespace(window=window, callbacks={})
    messages = []
    for callback in (NoiseScale(), SampleNoiseScale()):
        with pytest.raises(UsageError) as refused:
            callback.check(trainer, "callbacks.noise")
        messages.append(str(refused.value))
    assert dist.get_world_size() == 1
    return messages


def test_shards_are_refused(tmp_path: Path) -> None:
    for message in on_ranks(1, tmp_path, refusals)[0]:
        assert message.startswith("callbacks.noise: accum=fsdp has no whole gradients")
