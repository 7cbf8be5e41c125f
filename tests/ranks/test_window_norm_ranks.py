"""BatchNorm over the window of two ranks is torch's on the samples of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from accumexp.accum import Recovery, Window, data_parallel, rank_share, window_batch_norm

from ..support.ranks import on_ranks
from ..support.reference import gradients, larger_batch
from ..unit.test_terms import LOSSES
from ..unit.test_window_norm import error_of, net_and_batch

# Samples of a window and its micro-batches; in the last one rank 1 has padding alone.
SPLITS = [(13, 3), (6, 2), (2, 2)]
WRAPPERS = ["sums", "averages", "recovery"]
Outcome = tuple[dict[str, Tensor], dict[str, Tensor]]


def window(wrapper: str, loss: object, samples: int, steps: int) -> Outcome:
    model, inputs, targets = net_and_batch(samples)
    window_batch_norm(model)
    wrapped = DistributedDataParallel(model) if wrapper == "averages" else data_parallel(model)
    window = Window(wrapped, loss, steps)  # type: ignore[arg-type]
    backward = Recovery(window).backward if wrapper == "recovery" else window.backward
    parts = rank_share(samples, steps, dist.get_rank(), dist.get_world_size())
    rows = [row for part in parts for row in part]
    backward(inputs[rows or [0]], targets[rows or [0]], steps=steps, samples=len(rows))
    return gradients(model), dict(model.named_buffers())


def windows() -> dict[tuple[str, int], Outcome]:
    outcomes = {
        (wrapper, samples): window(wrapper, nn.CrossEntropyLoss(), samples, steps)
        for wrapper in WRAPPERS
        for samples, steps in SPLITS
    }
    with pytest.raises(ValueError, match="features: Expected more than 1 value per channel"):
        window("sums", nn.CrossEntropyLoss(), 1, 1)
    return outcomes | {("coupled", 13): window("sums", LOSSES["next sample"], 13, 2)}


def test_two_ranks_are_the_larger_batch(tmp_path: Path) -> None:
    for outcomes in on_ranks(2, tmp_path, windows):
        assert len(outcomes) == len(WRAPPERS) * len(SPLITS) + 1
        for (case, samples), (gradient, buffers) in outcomes.items():
            loss = LOSSES["next sample"] if case == "coupled" else F.cross_entropy
            expected, left = larger_batch(net_and_batch(samples)[0], loss, *net_and_batch(samples)[1:])
            assert error_of(gradient, expected) <= 1e-12, case
            for name in left:
                torch.testing.assert_close(buffers[name], left[name], rtol=1e-12, atol=1e-13)
