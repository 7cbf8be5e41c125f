"""Arguments of the proof, what it keeps in memory, and its verdict on unusual loops and modules."""

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
from torch.optim.lr_scheduler import ReduceLROnPlateau

from accumexp.environment.ranks import RankInfo
from accumexp.proof import Certificate, certify, diagnosis
from accumexp.proof.arguments import batches_of
from accumexp.proof.coupling import coupling_modules
from accumexp.proof.float64 import DOUBLE
from accumexp.proof.problem import Problem, TrainingState, cast
from accumexp.prove import session as certifying
from accumexp.prove.experiment import problem_of, prove_experiment
from accumexp.prove.trainer_loop import TrainerLoop
from accumexp.run import session as runner
from accumexp.run.session import Run
from accumexp.run.spec import RunSpec
from accumexp.tracking import MLflowTracker, Store
from accumexp.tracking.run_folder import RunFolder
from accumexp.training.callbacks import Callback
from accumexp.training.experiment import Experiment
from accumexp.training.trainer import Trainer

from ..support.experiments import composed
from .wrong_loops import STEPS, classifier, right, samples, split

SMALL = ("device=cpu", "model=mlp", "model.hidden=[8]", "data.image_size=8", "accum.steps=4")


def test_only_the_newest_trainer_of_the_runs_own_loop_is_kept() -> None:
    config = composed(*SMALL)
    problem = problem_of(Experiment.build(config))
    loop = problem.train_window
    assert isinstance(loop, TrainerLoop)
    models = []
    for _ in range(5):
        start = TrainingState(problem, DOUBLE)
        models.append(weakref.ref(start.inner))
        for _ in range(2):
            start.train(cast(problem.batches[0], DOUBLE))
        del start
    gc.collect()
    assert [model() is not None for model in models] == [False, False, False, False, True]


def test_a_proofs_memory_is_released_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Any] = []

    def certified(*_: Any) -> dict[str, str]:
        model = nn.Linear(2, 2)
        model.register_forward_hook(lambda *_: model)  # a cycle, as hooks make them
        left.append(weakref.ref(model))
        return {}

    class Reached(Exception): ...

    def reached(*arguments: Any) -> None:
        assert left[0]() is None
        raise Reached

    monkeypatch.setattr(certifying, "certified", certified)
    monkeypatch.setattr(runner.Experiment, "build", reached)
    spec = RunSpec(composed(*SMALL, "prove=true", "tracking=none"), RunFolder(tmp_path))
    gc.disable()
    try:
        with pytest.raises(Reached):
            Run(spec, RankInfo()).execute()
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
    experiment = Experiment.build(config)
    monkeypatch.setattr(certifying, "prove_experiment", lambda *_: (Certificate([]), experiment))
    monkeypatch.setattr(MLflowTracker, "artifact", full)
    with pytest.raises(OSError, match="disk is full"):
        certifying.make_certificate(config, RunFolder(tmp_path), RankInfo())
    runs = Store(config.tracking).client.search_runs([Store(config.tracking).experiment_id])
    assert [run.info.status for run in runs] == ["FAILED"]


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Numbering(nn.Module):
    """Returns integers alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.argsort(0)


class Numbered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbering = Numbering()

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.numbering(x)


class Whole(nn.Module):
    """Raises an AssertionError for half a batch."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != len(samples()[0]):
            raise AssertionError("a whole batch is wanted")
        return x


class Counting(nn.Module):
    """Increments a buffer or a number with every call."""

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
    """Couples samples as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


def coupling(*modules: nn.Module) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), *modules, nn.Linear(9, 5))
    problem = Problem(right, model, nn.CrossEntropyLoss(), [samples()], STEPS, lambda p: SGD(p, lr=0.1))
    return [each.kind for each in coupling_modules(problem, samples())]


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
    """Computes its gradient in the closure that it passes to its optimizer."""

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
    certificate = certify(closure_loop(name), classifier(), loss, samples(), STEPS, updates=4)
    assert str(certificate) == "proved"
    certificate = certify(closure_loop(name, 4.0), classifier(), loss, samples(), STEPS, updates=4)
    assert "4 times the larger batch's" in str(certificate)


class Impatient(Callback):
    """Stops the run after the third update."""

    def update_end(self, trainer: Trainer) -> None:
        if trainer.progress.update >= 3:
            trainer.stop("enough")


@pytest.mark.parametrize(
    "callback",
    ["+callbacks.own={_target_: tests.proof.test_certify.Impatient}", "callbacks=early_stopping"],
    ids=("own", "early stopping"),
)
def test_a_callback_that_stops_the_run_does_not_stop_its_proof(callback: str) -> None:
    config = composed(*SMALL, "proof.updates=40", callback)
    certificate, _ = prove_experiment(config, RankInfo(), lambda stage: None)
    assert str(certificate) == "proved"
    by_name = {check.name: check for check in certificate.checks}
    assert "gradient, 40 updates" in by_name
    assert by_name["resume from the middle"].detail == "stopped after update 20 of 40"


class Two(nn.Module):
    """Takes two tensors, or a dict of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(6, 5)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.layer(a * b)


def nested(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
    (a, b), targets = batch
    labels = targets["labels"] if isinstance(targets, dict) else targets
    parts = zip(a.split(4), b.split(4), labels.split(4), strict=True)
    for one, other, those in parts:
        (cross_entropy(model(one, other), those, reduction="sum") / len(labels)).backward()
    optimizer.step()
    optimizer.zero_grad()


def of_dict(outputs: Tensor, targets: Any) -> Tensor:
    return cross_entropy(outputs, targets["labels"])


X, Y = samples()


@pytest.mark.parametrize(
    ("loop", "model", "loss", "batch"),
    [
        (right, classifier, cross_entropy, (X, Y)),
        (right, classifier, cross_entropy, [X, Y]),
        (right, classifier, cross_entropy, [[X, Y], [X.flip(0), Y]]),
        (right, classifier, cross_entropy, ((X, Y), (X.flip(0), Y))),
        (nested, Two, cross_entropy, ((X, X + 1), Y)),
        (nested, Two, of_dict, ([X, X + 1], {"labels": Y})),
        (nested, Two, cross_entropy, [((X, X + 1), Y)]),
    ],
    ids=("tuple", "list", "lists", "tuples", "two inputs", "dict", "a list of two inputs"),
)
def test_batches_in_every_form_of_a_data_loader(loop: Any, model: Any, loss: Any, batch: Any) -> None:
    assert str(certify(loop, model(), loss, batch, STEPS, updates=2)) == "proved"


def test_what_is_one_batch_and_what_are_two() -> None:
    assert len(batches_of(((X, X), Y))) == len(batches_of([X, Y])) == len(batches_of((X, (Y, Y)))) == 1
    assert len(batches_of([((X, X), (Y, Y))])) == 1
    assert len(batches_of(((X, Y), (X, Y)))) == 2


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], "an empty list"),
        ((), "an empty tuple"),
        (X, "not a Tensor"),
        ((X, "Y"), "not a tuple of Tensor, str"),
        ([(X, Y), (X, Y), X], "not a list of tuple, tuple, Tensor"),
        ((X, Y, Y), "not a tuple of Tensor, Tensor, Tensor"),
        ((X, Y[:3]), "share their first dimension"),
    ],
    ids=("no list", "no tuple", "tensor", "words", "no pair", "three", "sizes"),
)
def test_batches_of_no_form_are_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certify(right, classifier(), nn.CrossEntropyLoss(), batch, STEPS)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU, "model: it has no parameters"),
        (lambda: nn.Linear(6, 5).requires_grad_(False), "none of its parameters requires a gradient"),
        (lambda: nn.Sequential(nn.LazyLinear(5)), "0.weight has no shape yet"),
    ],
    ids=("none", "frozen", "lazy"),
)
def test_models_without_a_gradient_to_compare_are_refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certify(right, model(), nn.CrossEntropyLoss(), samples(), STEPS)


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer: LBFGS.step\(\) needs closure"):
        certify(right, classifier(), cross_entropy, samples(), STEPS, optimizer=torch.optim.LBFGS)


def test_a_schedule_that_needs_more_than_updates_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scheduler: ReduceLROnPlateau.step\(\) needs metrics"):
        certify(right, classifier(), cross_entropy, samples(), STEPS, scheduler=ReduceLROnPlateau)


@pytest.mark.parametrize("updates", [0, -1])
def test_nothing_is_certified_without_an_update(updates: int) -> None:
    with pytest.raises(ValueError, match=f"updates={updates}: "):
        certify(right, classifier(), cross_entropy, samples(), STEPS, updates=updates)


def test_a_search_for_the_cause_that_fails_loses_no_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("of the\nsearch")

    monkeypatch.setattr(diagnosis, "diagnose", broken)
    certificate = certify(
        closure_loop(False, 4.0), classifier(), nn.CrossEntropyLoss(), samples(), STEPS, updates=2
    )
    assert "gradient, fp64" in [check.name for check in certificate.failed]
    assert [cause.source for cause in certificate.causes] == ["unknown"]
    assert str(certificate).startswith("not proved: the search for the cause failed: KeyError: 'of the")
    assert "\n" not in str(certificate)
