"""Accuracy is torchmetrics' own, leaves out ignored items, and is of a whole window."""

from __future__ import annotations

import pytest
import torch

from accumexp.data.text import IGNORED
from accumexp.training.evaluation import WindowMetrics
from accumexp.training.metrics import Accuracy, Metrics


def test_accuracy_is_torchmetrics_own_and_counts_no_ignored_item(generator: torch.Generator) -> None:
    from torchmetrics.classification import MulticlassAccuracy

    for shape in ((50,), (50, 9), (50, 3, 4)):
        outputs = torch.randn(shape[0], 7, *shape[1:], generator=generator)
        targets = torch.randint(0, 7, shape, generator=generator)
        targets[torch.rand(shape, generator=generator) < 0.6] = IGNORED
        for ignored in (IGNORED, 2):
            labels = targets.where(targets >= 0, ignored)
            ours = Accuracy(ignored)
            theirs = MulticlassAccuracy(7, average="micro", ignore_index=ignored, validate_args=False)
            for part in (slice(0, 20), slice(20, 50)):
                ours.update(outputs[part], labels[part])
                theirs.update(outputs[part], labels[part])
            assert float(ours.compute()) == float(theirs.compute()) > 0
    nothing = Accuracy()
    nothing.update(outputs, torch.full_like(targets, IGNORED))
    assert float(nothing.compute()) == 0


@pytest.mark.parametrize("kept", [0, 2**16])
def test_a_windows_accuracy_is_that_of_its_bytes_not_the_mean_of_means(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three bytes of one micro-batch are right, the one of the other is wrong: 3 of 4, not 1 of 2."""
    monkeypatch.setattr(WindowMetrics, "LARGEST", kept)
    metrics = WindowMetrics(Metrics({"accuracy": Accuracy()}))
    outputs = torch.zeros(1, 2, 3)
    outputs[:, 1] = 1.0
    metrics.observe(outputs, torch.tensor([[1, 1, 1]]))
    metrics.observe(outputs, torch.tensor([[0, IGNORED, IGNORED]]))
    assert metrics.values() == {"accuracy": 0.75}
