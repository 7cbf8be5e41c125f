"""Random draws are held fixed by sample, in any split, on any rank, or the proof says that they cannot be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from accumexp.proof import certify
from accumexp.proof.fixed_draws import fixed_draws
from accumexp.proof.float64 import DOUBLE, keep_float64
from accumexp.proof.larger_batch import call

from ..support.ranks import on_ranks
from .clean_models import Attention
from .wrong_loops import STEPS, right, samples
from .wrong_ranks import right as right_ranks


class Noisy(nn.Module):
    """Draws with every operator that can be held fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.4)
        self.alpha = nn.AlphaDropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.alpha(self.drop(x)) + torch.randn_like(x)
        x = x * torch.bernoulli(torch.full_like(x, 0.5)) + torch.rand(x.shape)
        x = x * x.new_empty(len(x), 1).bernoulli_(0.8) + torch.empty_like(x).exponential_(2.0)
        return x + torch.empty_like(x).uniform_(-1.0, 1.0) + torch.empty_like(x).normal_(1.0, 2.0)


@pytest.mark.parametrize("kind", ["noise", "attention"])
def test_a_sample_draws_the_same_in_any_split_and_order(kind: str) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if kind == "noise":
        model, inputs = Noisy().to(DOUBLE), torch.randn(9, 6, generator=generator, dtype=DOUBLE)
    else:
        model, inputs = Attention(0.3).to(DOUBLE), torch.randint(0, 11, (9, 5), generator=generator)
        inputs[:, 0] = torch.arange(9)  # samples that differ
    batch = (inputs, inputs)

    def outputs(order: list[int], sizes: list[int], seed: int = 5) -> Tensor:
        with keep_float64(DOUBLE), fixed_draws(model, batch, seed):
            outputs_in_order = torch.cat([call(model, part) for part in inputs[order].split(sizes)])
        return outputs_in_order[torch.argsort(torch.tensor(order))]

    whole = outputs(list(range(9)), [9])
    for order, sizes in ((list(range(9)), [4, 4, 1]), ([8, 3, 1, 0, 2, 7, 5, 6, 4], [2, 3, 4])):
        torch.testing.assert_close(outputs(order, sizes), whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(outputs(list(range(9)), [9], seed=6), whole)


def test_fixed_dropout_keeps_as_often_as_it_should() -> None:
    drop = nn.Dropout(0.3)
    inputs = torch.ones(200, 50, dtype=DOUBLE) + torch.arange(200, dtype=DOUBLE).unsqueeze(1)
    with fixed_draws(drop, (inputs, inputs), 1):
        kept = drop(inputs) != 0
    assert abs(float(kept.double().mean()) - 0.7) < 5 * math.sqrt(0.21 / 10000)
    assert len({tuple(row) for row in kept.int().tolist()}) == 200


def test_draws_that_cannot_be_held_fixed_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.RReLU())
    certificate = certify(right, model, nn.CrossEntropyLoss(), samples(), STEPS, updates=1)
    assert str(certificate) == (
        "not proved: 1: draws of rrelu_with_noise cannot be held fixed by sample, so nothing is certified"
    )


def test_dropout_is_excused_by_name_and_the_rest_is_proved() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.2), nn.Linear(9, 5))
    certificate = certify(right, model, nn.CrossEntropyLoss(), samples(), STEPS, updates=3)
    assert str(certificate) == "proved up to dropout draws (1 (Dropout), 3 (Dropout))"


def equal_samples(dropout: float) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(dropout), nn.Linear(9, 5))
    inputs, targets = samples()
    batch = inputs[torch.arange(len(inputs)) // 2], targets
    prepare = nn.parallel.DistributedDataParallel
    return str(certify(right_ranks, model, nn.CrossEntropyLoss(), batch, STEPS, updates=3, prepare=prepare))


def test_equal_samples_on_several_ranks_are_all_seen(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path / "plain", equal_samples, 0.0) == ["proved"] * 2
    drawn = "proved up to dropout draws (1 (Dropout))"
    assert on_ranks(2, tmp_path / "drawn", equal_samples, 0.3) == [drawn] * 2
