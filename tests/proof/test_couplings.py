"""What couples the samples of a batch is found and named: modules, losses and outputs of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accumexp.proof import certify
from accumexp.proof.coupling import NEGLIGIBLE, coupling_modules, loss_couples

from .problems import problem_of
from .wrong_loops import STEPS, classifier, right, samples, split


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_modules_that_couple_samples_are_found_and_no_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Dropout(0.3), Centred(), nn.Linear(8, 5)
    )  # fmt: skip
    couplings = coupling_modules(problem_of(model, nn.CrossEntropyLoss(), samples()), samples())
    assert [(c.name, c.kind) for c in couplings] == [("2", "BatchNorm1d"), ("4", "Centred")]
    assert all(c.effect > 1e-3 for c in couplings)
    plain = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.Dropout(0.3))
    assert coupling_modules(problem_of(plain, nn.CrossEntropyLoss(), samples()), samples()) == []


def info_nce(outputs: Tensor, targets: Tensor) -> Tensor:
    scores = nn.functional.normalize(outputs, dim=1) @ nn.functional.normalize(outputs, dim=1).T
    return nn.functional.cross_entropy(scores / 0.1, torch.arange(len(outputs)).roll(1))


@pytest.mark.parametrize("loss", [info_nce, lambda o, t: o.var(0).mean()], ids=("InfoNCE", "variance"))
def test_losses_that_couple_samples_are_found(loss: Any) -> None:
    assert loss_couples(problem_of(classifier(), loss, samples()), samples()) > 1e-3


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.rand(5) + 0.1), nn.CrossEntropyLoss(reduction="sum")],
)
def test_means_and_sums_do_not_couple_samples(loss: nn.Module) -> None:
    assert loss_couples(problem_of(classifier(), loss, samples()), samples()) <= NEGLIGIBLE


def test_a_norm_over_micro_batches_of_two_is_diagnosed() -> None:
    """Smaller windows would have a micro-batch of one sample, of which the norm has no statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    inputs, targets = samples()

    def pairs(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
        for few, labels in zip(batch[0].split(2), batch[1].split(2), strict=True):
            loss = nn.functional.cross_entropy(model(few), labels, reduction="sum")
            (loss / len(batch[1])).backward()
        optimizer.step()
        optimizer.zero_grad()

    certificate = certify(pairs, model, nn.CrossEntropyLoss(), (inputs[:8], targets[:8]), 4, updates=2)
    assert "1 (BatchNorm1d): statistics over 2 of 8 samples" in str(certificate)
    assert "gradient, ragged last window" in {check.name for check in certificate.checks}


class Balanced(nn.Module):
    """Returns classes and a number for the whole batch, as a mixture of experts does."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(6, 4), nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> Any:
        shares = self.gate(inputs).softmax(1)
        return {"classes": self.head(shares), "balance": shares.mean(0).square().sum(), "name": "balanced"}


def balanced(outputs: Any, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs["classes"], targets) + outputs["balance"]


def test_an_output_of_the_whole_batch_is_named_in_the_verdict() -> None:
    def window(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
        for inputs, targets in split(batch):
            (balanced(model(inputs), targets) * len(targets) / len(batch[1])).backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    certificate = certify(window, Balanced(), balanced, samples(), STEPS, updates=1)
    assert str(certificate).startswith("not proved: (model) (Balanced), output['balance']: couples samples")


def test_a_coupling_loss_and_batch_norm_are_named_in_the_verdict() -> None:
    def window(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
        for inputs, targets in split(batch):
            (info_nce(model(inputs), targets) * len(targets) / len(batch[1])).backward()
        optimizer.step()
        optimizer.zero_grad()

    certificate = certify(window, classifier(), info_nce, samples(), STEPS, updates=1)
    assert str(certificate).startswith("not proved: loss (info_nce): couples samples")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    certificate = certify(right, model, nn.CrossEntropyLoss(), samples(), STEPS, updates=1)
    assert "1 (BatchNorm1d): statistics over 4 of 16 samples" in str(certificate)
    assert {"gradient, fp64", "buffers"} <= {check.name for check in certificate.failed}
