"""Law 10: where equality cannot hold, it is said by module and reason, and it is true."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from accumexp.accum import Window, inequalities

from ..support.reference import gradients, relative_error


def batch_norm_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()


def test_law_10_batch_norm_is_named_and_does_differ() -> None:
    model = batch_norm_model()
    (inequality,) = inequalities(model, samples=128, steps=4)
    assert (inequality.module, inequality.kind) == ("1", "BatchNorm1d")
    assert inequality.reason == "batch statistics over 32 of 128 samples"
    inputs, targets = torch.randn(128, 6, dtype=torch.float64), torch.randint(0, 3, (128,))
    nn.functional.cross_entropy(model(inputs), targets).backward()
    larger = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    Window(model, nn.CrossEntropyLoss(), 4).backward(inputs, targets)
    assert relative_error(gradients(model), larger) > 1e-3


def test_law_10_nothing_is_named_where_the_window_is_the_larger_batch() -> None:
    model = batch_norm_model()
    assert inequalities(model, samples=128, steps=1) == []
    assert inequalities(model.eval(), samples=128, steps=4) == []
    plain = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.Dropout(0.0))
    assert inequalities(plain, samples=128, steps=4) == []


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.1),
        nn.Dropout2d(0.1),
        nn.AlphaDropout(0.1),
        nn.RReLU(),
        nn.LSTM(2, 2, num_layers=2, dropout=0.1),
        nn.MultiheadAttention(4, 2, dropout=0.1),
        nn.SyncBatchNorm(3),
        nn.InstanceNorm1d(3, track_running_stats=True),
    ],
    ids=lambda module: type(module).__name__,
)
def test_law_10_every_kind_of_draw_and_statistic_is_named(module: nn.Module) -> None:
    kinds = [inequality.kind for inequality in inequalities(nn.Sequential(module), samples=8, steps=2)]
    assert kinds == [type(module).__name__]
