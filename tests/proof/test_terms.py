"""Certificates of losses of several terms and of losses that couple samples, in one pass and in two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accumexp.accum import Term, window_batch_norm
from accumexp.environment.ranks import RankInfo
from accumexp.proof import certify
from accumexp.proof.additivity import loss_average
from accumexp.proof.loss_terms import read_terms
from accumexp.prove.experiment import prove_experiment

from ..support.experiments import composed
from ..support.losses import ScaledCrossEntropy
from ..unit.test_terms import LOSSES
from .wrong_loops import Setting, classifier, samples, split
from .wrong_terms import (
    ThreeTerms,
    balanced,
    by_terms,
    dropped,
    next_sample,
    ragged,
    rewarded,
    setting,
    with_window,
)


def certified(loss: Any, loop: Any, of: Setting, **options: Any) -> str:
    return str(certify(loop, of.model(), loss, of.batch(), **{"steps": 4, "updates": 1, **options}))


@pytest.mark.parametrize("steps", [2, 3, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_windows_of_terms_and_of_coupled_samples_are_proved(name: str, steps: int) -> None:
    loss = LOSSES[name]
    assert certified(loss, with_window(lambda: loss)(), setting(lambda: loss), steps=steps) == "proved"


def test_a_loss_with_a_parameter_of_its_own_is_read() -> None:
    loss = ScaledCrossEntropy()
    loss.temperature.grad = torch.tensor(3.0)
    assert certified(loss, with_window(lambda: loss)(), setting(lambda: loss)) == "proved"


@pytest.mark.parametrize("name", ["means", "next sample"])
def test_windows_in_fp64_are_proved(name: str) -> None:
    loss, fp64 = LOSSES[name], torch.float64
    assert certified(loss, with_window(lambda: loss)(), setting(lambda: loss), precision=fp64) == "proved"


@pytest.mark.parametrize("name", [pytest.param("masked", marks=pytest.mark.slow), "next sample"])
def test_windows_of_two_passes_are_proved_up_to_dropout(name: str) -> None:
    loss = LOSSES[name]
    summary = certified(loss, with_window(lambda: loss)(), setting(lambda: loss, dropped))
    assert summary == "proved up to dropout draws (2 (Dropout))"


class Contrast:
    """`next_sample`, for a configuration."""

    couples = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return next_sample(outputs, targets)


@pytest.mark.parametrize("target", ["tests.proof.wrong_terms.ThreeTerms", "tests.proof.test_terms.Contrast"])
def test_an_experiment_with_such_a_loss_is_proved(target: str) -> None:
    small = "device=cpu", "model=mlp", "model.hidden=[8]", "data.image_size=8", "data.batch_size=32"
    loss = "~loss", f"+loss={{_target_: {target}}}", "accum=loss_scaled", "accum.steps=4", "proof.updates=2"
    certificate, _ = prove_experiment(composed(*small, *loss, "callbacks=none"), RankInfo(), lambda _: None)
    assert str(certificate) == "proved"


def test_rewards_normalised_over_the_window_need_one_pass() -> None:
    def window(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
        inputs, (actions, rewards) = batch
        advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-3)
        for rows in torch.arange(len(inputs)).split(4):
            chosen = model(inputs[rows]).log_softmax(1).gather(1, actions[rows].unsqueeze(1))[:, 0]
            (-(advantages[rows] * chosen).sum() / len(inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    inputs, actions = samples()
    batch = inputs, (actions, inputs[:, 0].square())
    assert str(certify(window, classifier(), rewarded, batch, 4, updates=2)) == "proved"


def own_means(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
    """Each micro-batch's loss by itself, divided by the number of micro-batches."""
    parts = split(batch)
    for inputs, targets in parts:
        terms = ThreeTerms().terms(model(inputs), targets)
        (torch.stack([term.value for term in terms.values()]).sum() / len(parts)).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_terms_with_their_own_denominators_are_named_one_by_one() -> None:
    lines = certified(ThreeTerms(), own_means, setting(ThreeTerms, batch=ragged)).splitlines()
    means = "is divided by each micro-batch's own weight"
    assert lines[0].startswith(f"not proved: term 'masked' {means}, (4, 1, 4, 2), not by the window's, 11")
    assert lines[1].startswith(f"also: term 'balance' {means}")


def undeclared(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return balanced(outputs, targets)


def test_a_term_that_couples_samples_without_saying_so_is_named() -> None:
    summary = certified(undeclared, with_window(lambda: undeclared)(), setting(lambda: undeclared))
    assert "term 'balance' of 16 samples is not the mean of its micro-batches' by samples" in summary


def test_a_logged_loss_without_a_term_is_named() -> None:
    def window(model: Any, optimizer: Any, batch: Any, steps: int) -> float:
        with torch.no_grad():
            whole = ThreeTerms().terms(model(batch[0]), batch[1])
        logged = float(whole["classes"].value + whole["masked"].value)
        with_window(ThreeTerms)()(model, optimizer, batch, steps)
        return logged

    summary = certified(ThreeTerms(), window, setting(ThreeTerms, batch=ragged))
    assert "update 1: without term 'balance'" in summary


def test_a_denominator_of_zero_is_named() -> None:
    def undefined(name: str, term: Term, k: int, every: list[dict[str, Term]]) -> Tensor:
        return term.coefficient * term.total / sum(float(terms[name].weight) for terms in every)

    inputs, targets = ragged()
    batch = inputs, targets.where(torch.arange(16) > 2, 0)
    certificate = certify(by_terms(undefined), classifier(), ThreeTerms(), batch, 4, updates=1)
    assert "the gradient of 0.weight is not finite, in a window of 2 of 16 samples" in str(certificate)


def test_declared_losses_are_not_measured() -> None:
    outputs, targets = torch.randn(16, 5), samples()[1]
    assert loss_average(ThreeTerms(), outputs, targets) is None
    assert loss_average(next_sample, outputs, targets) is None


@pytest.mark.parametrize(
    ("term", "message"), [(1.0, "term 'a' is a float"), (torch.ones(2), "term 'a' has shape")]
)
def test_a_term_that_cannot_be_read_is_named(term: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_terms({"a": term})


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5))


def test_a_norm_over_the_window_is_proved_within_the_rounding_of_fp32() -> None:
    """Its micro-batches by themselves have another gradient, which must not widen the bound."""
    model = window_batch_norm(normed())
    loop = with_window(lambda: next_sample)()
    certificate = certify(loop, model, next_sample, samples(), 4, updates=2)
    assert str(certificate) == "proved"
    bounds = [check.bound for check in certificate.checks if check.name.startswith("gradient, ")]
    assert len(bounds) == 5 and max(bounds) < 1e-5


def test_a_batch_norm_under_such_a_loss_is_still_named() -> None:
    summary = certified(next_sample, with_window(lambda: next_sample)(), setting(lambda: next_sample, normed))
    assert summary.startswith("not proved: 1 (BatchNorm1d): statistics over 4 of 16 samples")
