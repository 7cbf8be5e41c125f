"""Law 11 in the training loop: terms are logged and evaluated, and what cannot have them is refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accumexp.accum import Term
from accumexp.data import DigitViews, ResidentBatches, TwoViews
from accumexp.data.replica_batches import PlannedBatches
from accumexp.data.transforms import keyed_uniforms
from accumexp.environment.ranks import RankInfo
from accumexp.errors import TrainingError, UsageError
from accumexp.losses import load_balance
from accumexp.training import experiment as assembly
from accumexp.training import graph_check
from accumexp.training.components import placement
from accumexp.training.experiment import Experiment
from accumexp.training.metrics_sink import MemoryMetricsSink
from accumexp.training.preflight import check_experiment
from accumexp.training.replica_check import check_replicable, shared_splits
from accumexp.training.replica_trainer import ReplicaTrainer
from accumexp.training.trainer import Trainer
from accumexp.training.trainer_state import restore_trainer_state, trainer_state

from ..support.experiments import composed, weights
from ..support.reference import relative_error
from .test_graph import Tape

FEW = ("device=cpu", "precision=fp64", "callbacks=none", "trainer.max_updates=5", "trainer.epochs=10")
EXPERTS = (*FEW, "experiment=mixture_of_experts", "data.batch_size=200", "trainer.log_every=2")
TASKS = (*FEW, "experiment=two_tasks", "optimizer.lr=0.01", "trainer.log_every=2")
VIEWS = (
    *(*FEW, "experiment=contrastive", "monitor=eval/loss"),
    *("scheduler.warmup_updates=2", "data.batch_size=100"),
)


def experiment_of(*overrides: str) -> Experiment:
    return Experiment.build(composed(*overrides))


def trained(*overrides: str) -> tuple[Trainer, MemoryMetricsSink]:
    memory = MemoryMetricsSink()
    experiment = experiment_of(*overrides)
    check_experiment(experiment)
    trainer = experiment.trainer(memory)
    trainer.fit()
    return trainer, memory


@pytest.mark.parametrize(
    ("overrides", "names"),
    [(EXPERTS, ("balance", "cross_entropy")), (TASKS, ("digit", "parity")), (VIEWS, ())],
)
def test_law_11_a_run_of_any_steps_is_the_larger_batchs_with_its_terms(
    overrides: tuple[str, ...], names: tuple[str, ...]
) -> None:
    larger, expected = trained(*overrides, "accum.steps=1")
    trainer, memory = trained(*overrides, "accum.steps=3")
    assert relative_error(weights(trainer), weights(larger)) <= 1e-8
    losses = dict(memory.series("train/loss"))
    assert losses == pytest.approx(dict(expected.series("train/loss")), rel=1e-9)
    terms = [dict(memory.series(f"train/loss/{name}")) for name in names]
    for name, term in zip(names, terms, strict=True):
        # Of published updates only: every second one, and the last.
        assert term == pytest.approx(dict(expected.series(f"train/loss/{name}")), rel=1e-9)
        assert list(term) == [2, 4, 5]
    for update in terms[0] if terms else ():
        assert sum(term[update] for term in terms) == pytest.approx(losses[update], rel=1e-12)


def split_of(trainer: Trainer) -> tuple[Any, Any]:
    """The eval split in one piece."""
    (batch,) = list(trainer.splits.eval.epoch(0))
    return batch.inputs, batch.targets


def test_an_evaluation_has_each_terms_own_denominator() -> None:
    trainer, _ = trained(*TASKS)
    model = trainer.model.eval()
    inputs, targets = split_of(trainer)
    trainer.splits.eval.batch_size = 50  # batches with other numbers of labels
    values = trainer.evaluate("eval")
    outputs = model(inputs)
    digit = F.cross_entropy(outputs["digit"], targets["digit"]).item()
    parity = 0.5 * F.cross_entropy(outputs["parity"], targets["parity"]).item()
    assert values["eval/loss/digit"] == pytest.approx(digit, rel=1e-12)
    assert values["eval/loss/parity"] == pytest.approx(parity, rel=1e-12)
    assert values["eval/loss"] == pytest.approx(digit + parity, rel=1e-12)


def test_a_coupled_loss_is_evaluated_by_evaluation_batch() -> None:
    trainer, _ = trained(*EXPERTS)
    model = trainer.model.eval()
    inputs, targets = split_of(trainer)
    trainer.splits.eval.batch_size = 50
    values = trainer.evaluate("eval")
    outputs = model(inputs)
    each = [float(load_balance(part.detach())) * len(part) for part in outputs["router"].split(50)]
    assert values["eval/loss/balance"] == pytest.approx(0.05 * sum(each) / len(inputs), rel=1e-12)
    whole = F.cross_entropy(outputs["logits"], targets).item()
    assert values["eval/loss/cross_entropy"] == pytest.approx(whole, rel=1e-12)


class Means(nn.Module):
    """Not declared: a mapping of means over samples."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"cross_entropy": F.cross_entropy(outputs, targets), "size": outputs.square().mean()}


UNDECLARED = (*FEW, "model=mlp", f"loss._target_={__name__}.Means", "trainer.log_every=2")


def test_a_function_that_returns_means_by_name_is_evaluated_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer, memory = trained(*UNDECLARED, "accum.steps=4")
    assert not caplog.records, "no wrong denominator"
    assert [update for update, _ in memory.series("train/loss/size")] == [2, 4, 5]
    values = trainer.evaluate("eval")
    assert values["eval/loss"] == pytest.approx(values["eval/loss/size"] + values["eval/loss/cross_entropy"])


@pytest.mark.parametrize("overrides", [EXPERTS, TASKS, VIEWS])
def test_no_wrong_denominator_is_warned_of(
    overrides: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_experiment(experiment_of(*overrides, "accum.steps=4"))
    assert not caplog.records


@pytest.mark.parametrize("overrides", [EXPERTS, TASKS])
def test_law_8_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(overrides: tuple[str, ...]) -> None:
    whole, expected = trained(*overrides)
    first, _ = trained(*overrides, "trainer.max_updates=2")
    memory = MemoryMetricsSink()
    resumed = experiment_of(*overrides).trainer(memory)
    restore_trainer_state(resumed, trainer_state(first))
    resumed.fit()
    assert all(map(torch.equal, weights(resumed).values(), weights(whole).values()))
    for key in ("train/loss", "train/loss/balance", "train/loss/digit"):
        assert memory.series(key) == [point for point in expected.series(key) if point[0] > 2]


@pytest.mark.parametrize("overrides", [EXPERTS, TASKS])
def test_law_6_fp16_with_a_loss_scale_trains_and_skips_the_whole_window(overrides: tuple[str, ...]) -> None:
    fp16 = ("precision=fp16", "accum.loss_scale=dynamic", "accum.init_scale=1e9", "trainer.max_updates=25")
    _, memory = trained(*overrides, *fp16, "accum.steps=4", "trainer.epochs=20")
    skipped = memory.series("accum/skipped_windows")[-1][1]
    assert 0 < skipped < 20
    losses = [loss for _, loss in memory.series("train/loss")]
    assert losses[-1] < losses[0]


REFUSED = [
    ("accum.reduction=sum", TASKS, r"^accum.reduction=sum: adds the means .*; give accum.reduction=mean$"),
    ("accum.reduction=sum", UNDECLARED, r"^accum.reduction=sum: adds the means"),
    ("callbacks=noise_scale", TASKS, "^callbacks.noise_scale: the loss has several terms"),
    ("callbacks=sample_noise_scale", EXPERTS, "^callbacks.sample_noise_scale: the loss has several terms"),
    ("callbacks=noise_scale", UNDECLARED, "^callbacks.noise_scale: the loss has several terms"),
]


@pytest.mark.parametrize(("override", "overrides", "message"), REFUSED)
def test_what_has_no_meaning_with_terms_is_refused(
    override: str, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        trained(*overrides, override)


@pytest.mark.parametrize("overrides", [TASKS, EXPERTS, UNDECLARED])
def test_many_seeds_in_one_loop_are_refused(overrides: tuple[str, ...]) -> None:
    config = composed(*overrides)
    splits = shared_splits(config, placement(config, RankInfo()), "replicas")
    trainers = []
    for seed in (0, 1):
        assert isinstance(splits.train, ResidentBatches)
        planned = replace(splits, train=PlannedBatches(splits.train, seed))
        experiment = Experiment.build(replace(config, seed=seed), splits=planned)
        trainers.append(experiment.trainer(MemoryMetricsSink()))
    with pytest.raises(UsageError, match="^replicas=2: the loss has several terms .* -m seed=0,1,2$"):
        check_replicable(ReplicaTrainer(trainers), "replicas=2")


def test_a_graph_records_terms_but_no_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_the_cpu(window: Any, train: Any, device: torch.device) -> Any:
        return graph_check.checked_recorder(window, train, Tape)

    monkeypatch.setattr(assembly, "graphs", on_the_cpu)
    long = ("trainer.max_updates=12", "trainer.graph=true")
    graphed, memory = trained(*TASKS, *long)
    plain, expected = trained(*TASKS, *long[:1])
    assert relative_error(weights(graphed), weights(plain)) <= 1e-12
    for key in ("train/loss/digit", "train/loss/parity"):
        assert dict(memory.series(key)) == pytest.approx(dict(expected.series(key)), rel=1e-12)
    with pytest.raises(UsageError, match="^trainer.graph=true: the loss needs the outputs of the whole"):
        trained(*EXPERTS, *long)


def test_views_are_a_function_of_draws_and_the_first_view() -> None:
    images, _ = DigitViews(train=True, image_size=16).tensors
    draws = keyed_uniforms(torch.arange(5), 8, 1)
    views = TwoViews()(images[:5], draws)
    assert views.shape == images[:5].shape and not torch.equal(views[:, 0], views[:, 1])
    assert torch.equal(TwoViews()(images[:5, [0, 0]], draws), views)
    still = TwoViews(degrees=0, scale=0, shift=0)(images[:5], draws)
    assert torch.allclose(still[:, 0], images[:5, 0], atol=1e-5)


def test_a_linear_probe_is_the_least_squares_classifier() -> None:
    trainer, _ = trained(
        *("device=cpu", "precision=fp64", "experiment=contrastive", "trainer.max_updates=2"),
        "scheduler.warmup_updates=1",
        *("~callbacks.checkpoint", "~callbacks.progress"),
    )
    values = trainer.evaluate("test")
    encoder = trainer.model.eval().get_submodule("encoder")
    features: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.no_grad():
        for batches, epoch in ((trainer.splits.train, trainer.progress.epoch), (trainer.splits.test, 0)):
            samples: list[Any] = list(batches.epoch(epoch))
            parts = [(encoder(b.inputs.flatten(0, 1)), b.targets) for b in samples]
            rows = torch.cat([f.view(len(y), -1) for f, y in parts])
            features.append(torch.cat([rows, torch.ones(len(rows), 1)], 1).double())
            labels.append(torch.cat([y for _, y in parts]))
    ridge = 1e-3 * features[0].square().sum(0).mean()
    penalty = ridge.sqrt() * torch.eye(features[0].shape[1], dtype=torch.float64)
    penalty[-1] = 0
    one_hot = F.one_hot(labels[0], 10).double()
    rows, wanted = torch.cat([features[0], penalty]), torch.cat([one_hot, torch.zeros(len(penalty), 10)])
    fitted = torch.linalg.lstsq(rows, wanted).solution
    accuracy = ((features[1] @ fitted).argmax(1) == labels[1]).double().mean().item()
    assert values["test/probe_accuracy"] == pytest.approx(accuracy) and accuracy > 0.3


class Varying:
    """A term whose coefficient is another in every micro-batch."""

    def terms(self, outputs: Tensor, targets: Tensor) -> dict[str, Term]:
        total = F.cross_entropy(outputs, targets, reduction="sum")
        return {"scaled": Term(total, len(targets), float(outputs.detach().std()))}


def test_a_refusal_in_the_middle_of_a_run_is_one_line() -> None:
    with pytest.raises(TrainingError, match="^loss: term 'scaled' has the coefficients .*: multiply total"):
        trained(*FEW, f"loss._target_={__name__}.Varying", "accum.steps=4")


def test_parameters_of_a_loss_that_no_optimizer_trains_are_refused() -> None:
    with pytest.raises(UsageError, match="no optimizer trains its parameters temperature; make them"):
        trained(*FEW, "loss._target_=tests.support.losses.ScaledCrossEntropy")
