"""Gradients added up in fp32 agree on all ranks, and are rounded after they are added."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accumexp.accum import Window, data_parallel

from ..support.ranks import on_ranks
from ..support.reference import classification, larger_batch_gradient, relative_error, small_model
from .windows import Branches, own_part, whole_gradients


def branched() -> dict[str, Tensor]:
    model = data_parallel(Branches().bfloat16(), find_unused_parameters=True)
    inputs, targets = classification(8)
    inputs[:, 0] = 1.0 if dist.get_rank() == 0 else -1.0
    Window(model, nn.CrossEntropyLoss(), 2, fp32_buffers=True).backward(inputs.bfloat16(), targets)
    return whole_gradients(model)


def test_fp32_buffers_agree_where_ranks_use_different_parameters(tmp_path: Path) -> None:
    first, second = on_ranks(2, tmp_path, branched)
    assert first.keys() == second.keys() and len(first) == 4
    assert all(torch.equal(first[name], second[name]) and first[name].any() for name in first)


def in_bf16(steps: int) -> dict[str, Tensor]:
    model = data_parallel(small_model().bfloat16())
    inputs, targets, count = own_part(classification(64), steps)
    window = Window(model, nn.CrossEntropyLoss(), steps, fp32_buffers=True)
    window.backward(inputs.bfloat16(), targets, samples=count)
    return whole_gradients(model)


def test_fp32_buffers_add_over_ranks_before_they_round(tmp_path: Path) -> None:
    """Every rank holds the same bits, and more micro-batches do not make them worse."""
    inputs, targets = classification(64)
    model = small_model().bfloat16().double()
    expected = larger_batch_gradient(model, nn.CrossEntropyLoss(), inputs.bfloat16().double(), targets)
    for steps in (2, 16):
        first, second = on_ranks(2, tmp_path / str(steps), in_bf16, steps)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert relative_error({n: g.double() for n, g in first.items()}, expected) < 2e-2
