"""Over ranks: a list of micro-batches, a weight for each sample, and evaluation on a rank without samples."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from accumexp.accum import Ranks, Window, data_parallel, window_loss
from accumexp.accum.loss import WeightedSamples
from accumexp.data import ResidentBatches, Share
from accumexp.training.evaluation import Evaluator
from accumexp.training.metrics import Metrics

from ..support.ranks import on_ranks
from ..support.reference import (
    classification,
    gradients,
    larger_batch_gradient,
    relative_error,
    small_model,
)

SAMPLES = 23
SIZES = [[5, 1, 6], [2, 8, 1]]  # of each rank's micro-batches


def weights() -> Tensor:
    return torch.linspace(0, 2, SAMPLES, dtype=torch.float64)


def of_a_list(weighted: bool) -> dict[str, Tensor]:
    rank = dist.get_rank()
    inputs, targets = classification(SAMPLES)
    rank_rows = slice(0, 12) if rank == 0 else slice(12, SAMPLES)
    model = small_model()
    parts = [
        (x, (y, w) if weighted else y)
        for x, y, w in zip(
            *(each[rank_rows].split(SIZES[rank]) for each in (inputs, targets, weights())), strict=True
        )
    ]
    loss: Any = WeightedSamples(nn.CrossEntropyLoss()) if weighted else nn.CrossEntropyLoss()
    Window(data_parallel(model), loss, 3).backward(parts)
    return gradients(model)


@pytest.mark.parametrize("weighted", [False, True])
def test_law_2_a_list_of_micro_batches_is_counted_over_all_ranks(tmp_path: Path, weighted: bool) -> None:
    inputs, targets = classification(SAMPLES)
    given = weights() if weighted else torch.ones(SAMPLES, dtype=torch.float64)

    def larger(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return (losses * given).sum() / given.sum()

    expected = larger_batch_gradient(small_model(), larger, inputs, targets)
    for gradient in on_ranks(2, tmp_path, of_a_list, weighted):
        assert relative_error(gradient, expected) <= 1e-12


def evaluated(name: str, samples: int) -> dict[str, float]:
    from torchmetrics.classification import MulticlassAUROC
    from torchmetrics.regression import SpearmanCorrCoef

    # Of torchmetrics: on its buffers, and on classes that few samples do not have.
    warnings.filterwarnings("ignore", category=UserWarning)
    rank = dist.get_rank() if dist.is_initialized() else 0
    inputs, targets = classification(SAMPLES)
    metric: Any = MulticlassAUROC(5, thresholds=None)
    model = small_model()
    labels: Any = targets
    loss: Any = nn.CrossEntropyLoss()
    if name == "spearman":
        metric, labels, loss = SpearmanCorrCoef(), inputs.sum(1), nn.MSELoss()
        torch.manual_seed(0)
        last = nn.Linear(5, 1, bias=False, dtype=torch.float64)
        model = nn.Sequential(model, last, nn.Flatten(0))
    ranks = Ranks() if dist.is_initialized() else Ranks(alone=True)
    batches = ResidentBatches(
        inputs, labels, torch.arange(samples), SAMPLES, share=Share(rank, ranks.size, 1)
    )
    return Evaluator(window_loss(loss), Metrics({name: metric}), None, ranks)(model, batches)


@pytest.mark.parametrize("name", ["auroc", "spearman"])
def test_a_rank_without_samples_evaluates_with_the_others(tmp_path: Path, name: str) -> None:
    for samples in (3, 4):
        expected = evaluated(name, samples)
        for values in on_ranks(4, tmp_path / str(samples), evaluated, name, samples):
            assert values == pytest.approx(expected, rel=1e-12)
