"""The proof's larger batch is that of the reference, and has a bound of its rounding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from accumexp.proof import certify
from accumexp.proof.float64 import DOUBLE
from accumexp.proof.larger_batch import larger_batch
from accumexp.proof.problem import rows
from accumexp.proof.rounding import expected_update

from ..support.reference import classification, larger_batch_gradient, relative_error, small_model
from .problems import problem_of
from .wrong_loops import STEPS, classifier, right, samples


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(torch.rand(5, dtype=DOUBLE), label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum"),
    ],
    ids=("mean", "weights", "sum"),
)
def test_the_larger_batch_is_the_reference(criterion: nn.Module) -> None:
    model, batch = small_model(), classification(23)
    larger = larger_batch(model, criterion, batch)
    assert relative_error(larger.gradient, larger_batch_gradient(model, criterion, *batch)) < 1e-14
    assert all(p.grad is None for p in model.parameters())


def test_parts_of_the_larger_batch_add_up_to_it() -> None:
    """As columns of a mixture do: each with its share of the whole's weight."""
    model, batch = small_model(), classification(12)
    for loss in (nn.CrossEntropyLoss(torch.rand(5, dtype=DOUBLE)), nn.CrossEntropyLoss(reduction="sum")):
        whole = larger_batch(model, loss, batch).gradient
        weight = loss.weight[batch[1]].sum() if loss.weight is not None else 1.0
        parts = [
            larger_batch(model, loss, rows(batch, s), weight=weight).gradient
            for s in (slice(0, 5), slice(5, 12))
        ]
        added = {name: parts[0][name] + parts[1][name] for name in whole}
        assert relative_error(added, whole) < 1e-13


@pytest.mark.parametrize("count", [1, 2])
def test_a_small_window_that_fp32_computes_without_error_has_a_bound(count: int) -> None:
    """Another order of the operations still rounds: measured once, fp32 loses nothing here by chance."""
    model = nn.Linear(2, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, 0.25]]))
        model.bias.zero_()
    batch = torch.tensor([[1.0, 2.0]] * count).double(), torch.zeros(count, 1).double()
    expected = expected_update(problem_of(model, nn.MSELoss(), batch), batch, model)
    assert min(expected.bounds.values()) > 3 * 2.0**-53 * expected.size
    assert max(expected.bounds.values()) < 40 * 2.0**-53 * expected.size


def test_a_larger_batch_without_a_finite_gradient_is_refused() -> None:
    inputs, targets = samples()
    inputs[3, 2] = math.nan
    with pytest.raises(ValueError, match="gradient is not finite"):
        certify(right, classifier(), nn.CrossEntropyLoss(), (inputs, targets), STEPS)
