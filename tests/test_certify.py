"""What is given to the proof, what it holds and leaves, and what it says of unusual loops and modules."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from accumexp import certifying, runner
from accumexp.assembly import build_parts
from accumexp.callbacks import Callback
from accumexp.certifying import Certifying
from accumexp.order import Order
from accumexp.own_loop import OwnLoop
from accumexp.proof import Certificate, certify
from accumexp.proof.coupling import coupling_modules
from accumexp.proof.gradients import DOUBLE
from accumexp.proof.problem import Problem, Start, cast
from accumexp.proving import problem_of, prove_experiment
from accumexp.runner import Run
from accumexp.tracking import MLflowTracker, Store
from accumexp.trainer import Trainer
from accumexp.world import World

from .experiments import composed
from .wrong_loops import STEPS, classifier, right, samples, split

SMALL = ("device=cpu", "model=mlp", "model.hidden=[8]", "data.image_size=8", "accum.steps=4")


def test_only_the_newest_trainer_of_the_runs_own_loop_is_kept() -> None:
    config = composed(*SMALL)
    here = World()
    problem = problem_of(config, build_parts(config, here), here)
    loop = problem.train_window
    assert isinstance(loop, OwnLoop)
    models = []
    for _ in range(5):
        start = Start(problem, DOUBLE)
        models.append(weakref.ref(start.inner))
        for _ in range(2):
            start.train(cast(problem.batches[0], DOUBLE))
        del start
    gc.collect()
    assert [model() is not None for model in models] == [False, False, False, False, True]


def test_a_proofs_memory_is_released_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Any] = []

    def certified(config: Any, here: Any, folder: Any) -> dict[str, str]:
        model = nn.Linear(2, 2)
        model.register_forward_hook(lambda *_: model)  # a cycle, as hooks make them
        left.append(weakref.ref(model))
        return {}

    class Reached(Exception): ...

    def reached(config: Any, here: Any) -> None:
        assert left[0]() is None
        raise Reached

    monkeypatch.setattr(certifying, "certified", certified)
    monkeypatch.setattr(runner, "build_parts", reached)
    order = Order(composed(*SMALL, "prove=true", "tracking=none"), tmp_path, None, None, "")
    gc.disable()
    try:
        with pytest.raises(Reached):
            Run(order, World()).execute()
    finally:
        gc.enable()


def test_a_certificate_that_cannot_be_kept_leaves_no_run_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, path: Path, folder: str | None = None) -> None:
        if path.name == "certificate.json":
            raise OSError("the disk is full")

    store = f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"
    config = composed(*SMALL, store, "proof.updates=1")
    parts = build_parts(config, World())
    monkeypatch.setattr(certifying, "prove_experiment", lambda *_: (Certificate([]), parts))
    monkeypatch.setattr(MLflowTracker, "artifact", full)
    with pytest.raises(OSError, match="disk is full"):
        Certifying(Order(config, tmp_path, None, None, ""), World()).execute()
    found = Store(config.tracking).client.search_runs([Store(config.tracking).experiment_id])
    assert [run.info.status for run in found] == ["FAILED"]


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Numbering(nn.Module):
    """Integers alone come out."""

    def forward(self, x: Tensor) -> Tensor:
        return x.argsort(0)


class Numbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbering = Numbering()

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.numbering(x)


class Whole(nn.Module):
    """Cannot take half a batch, and says so in its own way."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != len(samples()[0]):
            raise AssertionError("a whole batch is wanted")
        return x


class Counting(nn.Module):
    """Moves a buffer, a number or both on with every call."""

    calls: Tensor

    def __init__(self, buffer: bool) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.buffer = buffer
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.buffer:
            self.calls.add_(1)
        else:
            self.count += 1
        return x * (1 + self.calls + self.count)


class Drifting(Counting):
    """Couples samples besides."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


def coupling(*modules: nn.Module) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), *modules, nn.Linear(9, 5))
    problem = Problem(right, model, nn.CrossEntropyLoss(), [samples()], STEPS, lambda p: SGD(p, lr=0.1))
    return [found.kind for found in coupling_modules(problem, samples())]


def spectral(layer: nn.Linear) -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(layer)


@pytest.mark.parametrize(
    "module",
    [
        lambda: Counting(True),
        lambda: Counting(False),
        lambda: spectral(nn.Linear(9, 9)),
        lambda: nn.Sequential(spectral(nn.Linear(9, 16)), nn.Linear(16, 9)),
        lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(9, 16)), nn.Linear(16, 9)),
        Numbered,
        Whole,
    ],
    ids=("buffer", "number", "spectral", "as many rows", "orthogonal", "integers", "whole"),
)
def test_modules_that_do_not_couple_samples_are_not_named(module: Any) -> None:
    assert coupling(module()) == []
    assert coupling(module(), Centred()) == ["Centred"]


def test_a_coupling_module_that_moves_buffers_on_is_named() -> None:
    assert coupling(nn.Sequential(Counting(True), Centred())) == ["Centred"]
    assert coupling(Drifting(True)) == ["Drifting"]
    assert coupling(nn.BatchNorm1d(9)) == ["BatchNorm1d"]
    shared = Centred()
    assert coupling(shared, shared) == ["Centred"]


def closure_loop(name: bool, factor: float = 1.0) -> Any:
    """Makes its gradient in the closure that it gives its optimizer."""

    def train_window(model: Any, optimizer: Any, batch: Any, steps: int) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            logged = torch.zeros(())
            for inputs, targets in split(batch):
                loss = cross_entropy(model(inputs), targets, reduction="sum") * factor / len(batch[1])
                loss.backward()
                logged += loss.detach()
            return logged

        return optimizer.step(closure=closure) if name else optimizer.step(closure)

    return train_window


@pytest.mark.parametrize("name", [True, False], ids=("by name", "by place"))
def test_the_gradient_of_a_closure_is_the_one_that_is_used(name: bool) -> None:
    loss = nn.CrossEntropyLoss()
    found = certify(closure_loop(name), classifier(), loss, samples(), STEPS, updates=4)
    assert str(found) == "proved"
    found = certify(closure_loop(name, 4.0), classifier(), loss, samples(), STEPS, updates=4)
    assert "4 times the larger batch's" in str(found)


class Impatient(Callback):
    """Wants to stop after the third update, as one does whose loss is low enough."""

    def update_end(self, trainer: Trainer) -> None:
        if trainer.progress.update >= 3:
            trainer.stop("enough")


@pytest.mark.parametrize(
    "callback",
    ["+callbacks.own={_target_: tests.test_certify.Impatient}", "callbacks=early_stopping"],
    ids=("own", "early stopping"),
)
def test_a_callback_that_stops_the_run_does_not_stop_its_proof(callback: str) -> None:
    config = composed(*SMALL, "proof.updates=40", callback)
    found, _ = prove_experiment(config, World(), lambda stage: None)
    assert str(found) == "proved"
    by_name = {check.name: check for check in found.checks}
    assert "gradient, 40 updates" in by_name
    assert by_name["resume from the middle"].detail == "stopped after update 20 of 40"
