"""Law 11 over two ranks: the denominators and the outputs are those of all samples of the window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from accumexp.accum import Recovery, Window, data_parallel, rank_share

from ..support.losses import ScaledCrossEntropy
from ..support.ranks import on_ranks
from ..support.reference import gradients, relative_error
from ..unit.test_terms import LOSSES, TooLarge, larger_batch, model_and_batch, value_of

# Samples of a window and its micro-batches; in the last one rank 1 has padding alone.
SPLITS = [(101, 3), (6, 2), (1, 1)]
WRAPPERS = ["sums", "averages", "recovery", "gradients"]


def share(samples: int, steps: int) -> tuple[Tensor, Tensor, int]:
    """This rank's samples of a window, one sample of padding if it has none, and their number."""
    _, inputs, targets = model_and_batch()
    parts = rank_share(samples, steps, dist.get_rank(), dist.get_world_size())
    rows = [row for part in parts for row in part]
    return inputs[rows or [0]], targets[rows or [0]], len(rows)


def windows() -> dict[tuple[str, str, int], tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]]:
    results = {}
    for name, loss in LOSSES.items():
        for wrapper in WRAPPERS:
            for samples, steps in SPLITS:
                model = model_and_batch()[0]
                wrapped = DistributedDataParallel(model) if wrapper == "averages" else data_parallel(model)
                late: Any = "gradients" if wrapper == "gradients" else "first_pass"
                window = Window(wrapped, loss, steps, late_weights=late)
                backward = Recovery(window).backward if wrapper == "recovery" else window.backward
                inputs, targets, count = share(samples, steps)
                result = backward(inputs, targets, steps=steps, samples=count)
                results[name, wrapper, samples] = gradients(model), result.loss, dict(result.terms)
    return results


def test_law_11_over_two_ranks(tmp_path: Path) -> None:
    model, inputs, targets = model_and_batch()
    for results in on_ranks(2, tmp_path, windows):
        assert len(results) == len(LOSSES) * len(WRAPPERS) * len(SPLITS)
        for (name, wrapper, samples), (gradient, loss, terms) in results.items():
            if samples == 1 and name == "next sample":
                continue  # a single sample has no other one
            whole = inputs[:samples], targets[:samples]
            expected = larger_batch(model, LOSSES[name], *whole)
            value = value_of(LOSSES[name], model(whole[0]), whole[1])
            if not value.isfinite():
                continue  # a mask without items
            case = f"{name}, {wrapper}, {samples} samples"
            assert relative_error(gradient, expected) <= 1e-12, case
            assert float(loss) == pytest.approx(float(value.detach()), rel=1e-12), case
            assert not terms or float(sum(terms.values())) == pytest.approx(float(loss), rel=1e-12), case


class Normed(nn.Module):
    """BatchNorm: its buffers come from the first rank in every window, and change once a micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def buffers(name: str) -> list[Tensor]:
    model = Normed()
    loss = LOSSES[name] if name in LOSSES else nn.CrossEntropyLoss()
    window = Window(data_parallel(model), loss, 2)
    inputs, targets, count = share(40, 2)
    for _ in range(2):
        window.backward(inputs, targets, samples=count)
    return [buffer.clone() for buffer in model.buffers()]


def both_buffers() -> list[list[Tensor]]:
    return [buffers("next sample"), buffers("plain")]


def test_buffers_after_two_passes_are_those_of_one(tmp_path: Path) -> None:
    for coupled, plain in on_ranks(2, tmp_path, both_buffers):
        assert all(torch.equal(one, other) for one, other in zip(coupled, plain, strict=True))


def parted() -> dict[tuple[str, str], tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]]:
    """Each rank has the targets of its own half of the classes; one of them runs out of memory at first."""
    results = {}
    for name in ("masked", "some"):
        for wrapper in ("sums", "recovery", "gradients"):
            model, inputs, targets = model_and_batch()
            if wrapper == "recovery" and dist.get_rank() == 1:
                model.register_forward_pre_hook(TooLarge(20))
            late: Any = "gradients" if wrapper == "gradients" else "first_pass"
            window = Window(data_parallel(model), LOSSES[name], 2, late_weights=late)
            half = slice(51) if dist.get_rank() == 0 else slice(51, None)
            backward = Recovery(window).backward if wrapper == "recovery" else window.backward
            backward(inputs[half], targets[half])
            model.zero_grad(set_to_none=False)
            result = backward(inputs[half], targets[half])
            results[name, wrapper] = gradients(model), result.loss, dict(result.terms)
    return results


def test_a_rank_may_lack_a_term_and_another_may_lack_memory(tmp_path: Path) -> None:
    model, inputs, targets = model_and_batch()
    for results in on_ranks(2, tmp_path, parted):
        assert len(results) == 6
        for (name, wrapper), (gradient, loss, terms) in results.items():
            expected = larger_batch(model, LOSSES[name], inputs, targets)
            value = float(value_of(LOSSES[name], model(inputs), targets).detach())
            assert relative_error(gradient, expected) <= 1e-12, (name, wrapper)
            assert float(loss) == pytest.approx(value, rel=1e-12)
            assert len(terms) == 3
            assert float(sum(terms.values())) == pytest.approx(value, rel=1e-12)


def refused_parameters() -> str:
    try:
        Window(data_parallel(model_and_batch()[0]), ScaledCrossEntropy(), 2)
    except ValueError as error:
        return str(error)
    return ""


def test_parameters_of_a_loss_are_refused_on_several_ranks(tmp_path: Path) -> None:
    for message in on_ranks(2, tmp_path, refused_parameters):
        assert message.startswith(
            "temperature: gradients of a loss's parameters are not added over the ranks"
        )
