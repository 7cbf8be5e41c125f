"""Recorded windows and steps, with a recorder for the CPU that replays by doing it again; compiled models."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accumexp.accum import GraphedWindow, GraphRecorder, OptimizerStep, Window
from accumexp.accum.graph import FIRST, GraphedStep, can_be_recorded
from accumexp.environment.random_state import random_state
from accumexp.errors import TrainingError, UsageError
from accumexp.training import experiment as assembly
from accumexp.training import graph_check
from accumexp.training.checkpoint import load, restore, save
from accumexp.training.metrics_sink import MemoryMetricsSink
from accumexp.training.trainer import Trainer
from accumexp.training.trainer_state import trainer_state

from ..support.experiments import composed, trainer_of, weights
from ..support.reference import classification, gradients, larger_batch_gradient, relative_error, small_model
from ..support.tape import Tape

RUN = [
    *("precision=fp32", "model=lenet5", "accum.steps=4", "data.batch_size=100", "trainer.max_updates=30"),
    *("scheduler=warmup_cosine", "scheduler.warmup_updates=5", "trainer.log_every=4"),
]


def tensors(node: Any) -> list[Tensor]:
    if isinstance(node, Tensor):
        return [node]
    if dataclasses.is_dataclass(node):
        node = [getattr(node, field.name) for field in dataclasses.fields(node)]
    return [tensor for item in node for tensor in tensors(item)] if isinstance(node, tuple | list) else []


class Again:
    """A recorder as a GPU's: recording computes nothing, and a replay fills the same tensors anew."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replays = 0

    def __call__(self, function: Callable[[], Any]) -> Callable[[], Any]:
        self.recorded += 1
        kept: list[Any] = []

        def replay() -> Any:
            self.replays += 1
            results = function()
            if not kept:
                kept.append(results)
            for old, new in zip(tensors(kept[0]), tensors(results), strict=True):
                old.detach().copy_(new.detach())
            return kept[0]

        return replay


def graphed_trainer(
    monkeypatch: pytest.MonkeyPatch, *overrides: str, kind: type[Again | Tape] = Again
) -> tuple[Trainer, MemoryMetricsSink, list[Again | Tape]]:
    made: list[Again | Tape] = []

    def recorder() -> GraphRecorder:
        made.append(kind())
        return made[-1]

    def on_the_cpu(window: Window, train: Any, device: torch.device) -> GraphRecorder:
        return graph_check.checked_recorder(window, train, recorder)

    monkeypatch.setattr(assembly, "graphs", on_the_cpu)
    trainer, memory = trainer_of(*overrides, "trainer.graph=true")
    return trainer, memory, made


def test_law_1_a_replayed_window_has_the_larger_batchs_gradient() -> None:
    model, criterion, again = small_model(), nn.CrossEntropyLoss(), Again()
    window = GraphedWindow(Window(model, criterion, 4), again)
    losses, expected_losses = [], []
    for samples in (50, 50, 50, 13, 50, 13, 13, 50, 13):
        inputs, targets = classification(samples)
        inputs = inputs + len(losses)
        model.zero_grad(set_to_none=False)
        losses.append(window.backward(inputs, targets).loss)
        expected = larger_batch_gradient(model, criterion, inputs, targets)
        expected_losses.append(criterion(model(inputs), targets).item())
        assert relative_error(gradients(model), expected) <= 1e-12
    # The results of the windows before are still theirs.
    assert [loss.item() for loss in losses] == pytest.approx(expected_losses, rel=1e-12)
    assert (again.recorded, again.replays) == (2, 9 - 2 * FIRST)


@functools.cache
def plain_run(*options: str) -> tuple[dict[str, Tensor], MemoryMetricsSink]:
    """The weights and metrics of `RUN` without graphs."""
    trainer, memory = trainer_of(*RUN, *options)
    trainer.fit()
    return weights(trainer), memory


@pytest.mark.parametrize(
    "options",
    [
        ["trainer.clip_norm=0.5"],
        ["optimizer=adamw", "model.dropout=0.2", "model=mlp"],
        ["accum.loss_scale=dynamic", "precision=fp16", "accum.growth_interval=3", "model=mlp"],
        ["optimizer=rmsprop"],
    ],
)
@pytest.mark.parametrize("kind", [Again, Tape])
def test_a_replayed_run_is_the_run(
    monkeypatch: pytest.MonkeyPatch, options: list[str], kind: type[Again | Tape]
) -> None:
    plain, expected = plain_run(*options)
    replayed, memory, made = graphed_trainer(monkeypatch, *RUN, *options, kind=kind)
    replayed.fit()
    assert made[-1].replays > 20
    # A rate on the device is fp32's, and AdamW multiplies it by the decay.
    off = relative_error(weights(replayed), plain)
    assert off <= 1e-6 if "optimizer=adamw" in options else not off
    for key in ("train/loss", "train/lr", "train/grad_norm", "train/accuracy", "eval/loss"):
        assert dict(memory.series(key)) == pytest.approx(dict(expected.series(key)), rel=1e-6), key
    if "accum.loss_scale=dynamic" in options:
        assert memory.series("accum/skipped_windows") == expected.series("accum/skipped_windows")
        assert memory.series("accum/skipped_windows")[-1][1] > 0
    recordable = "optimizer=rmsprop" not in options
    step = replayed.step
    assert isinstance(step, GraphedStep) and can_be_recorded(step.step) is recordable


def test_law_8_a_replayed_run_goes_on_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, *_ = graphed_trainer(monkeypatch, *RUN)
    whole.fit()
    first, *_ = graphed_trainer(monkeypatch, *RUN)
    first.total_updates = 17
    first.fit()
    path = tmp_path / "update-00000017.pt"
    save(path, {**trainer_state(first), "random": random_state()})
    kept = load(path)["optimizer"]["param_groups"]
    assert all(isinstance(group["lr"], float) for group in kept)
    second, *_ = graphed_trainer(monkeypatch, *RUN)
    restore(second, load(path), path)
    second.fit()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name


def test_a_state_that_is_loaded_is_recorded_anew() -> None:
    model, again = small_model().float(), Again()
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, fused=True)
    window = Window(model, nn.CrossEntropyLoss(), 2)
    step = GraphedStep(OptimizerStep(window, optimizer), again)
    inputs, targets = classification(8)
    window.backward(inputs.float(), targets)
    for _ in range(FIRST + 1):
        step()
    assert again.recorded == 1
    other = torch.optim.SGD(model.parameters(), 0.25, momentum=0.9, fused=True)
    optimizer.load_state_dict(other.state_dict())
    for _ in range(FIRST + 1):
        step()
    assert again.recorded == 2


def test_gradients_that_moved_are_recorded_anew() -> None:
    model, criterion, again = small_model(), nn.CrossEntropyLoss(), Again()
    window = GraphedWindow(Window(model, criterion, 2), again)
    inputs, targets = classification(8)
    for _ in range(FIRST + 1):
        model.zero_grad(set_to_none=False)
        window.backward(inputs, targets)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):  # the first is computed, to see whether they stay
        window.backward(inputs, targets)
    assert again.recorded == 2


def test_a_window_that_somebody_looks_into_is_not_replayed() -> None:
    model, again, seen = small_model(), Again(), []
    plain = Window(model, nn.CrossEntropyLoss(), 4)
    window = GraphedWindow(plain, again)
    inputs, targets = classification(8)
    for _ in range(FIRST + 2):
        window.backward(inputs, targets)
    assert again.replays == 2
    plain.after_micro_batch.append(lambda micro_batch: seen.append(micro_batch.number))
    window.backward(inputs, targets)
    assert seen == [0, 1, 2, 3] and again.replays == 2


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ([], "trainer.graph=true: CUDA graphs need a GPU, not device=cpu"),
        (["accum=ddp"], "trainer.graph=true: a graph is recorded of one process, not of accum=ddp"),
        (["accum.fp32_buffers=true"], "trainer.graph=true: not with accum.fp32_buffers=true"),
    ],
)
def test_what_no_graph_can_be_of_is_said_in_one_line(overrides: list[str], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        trainer_of(*overrides, "trainer.graph=true")
    assert str(refused.value).startswith(says) and len(str(refused.value).splitlines()) == 1


def test_a_model_that_cannot_be_recorded_is_refused_and_nothing_is_changed() -> None:
    trainer, _ = trainer_of(*RUN)
    before, drawn = weights(trainer), torch.get_rng_state()

    def refuses(function: Callable[[], Any]) -> Callable[[], Any]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def forgets(function: Callable[[], Any]) -> Callable[[], Any]:
        results: list[Any] = []

        def replay() -> Any:
            results[:] = results or [function()]
            return results[0]

        return replay

    train = trainer.splits.train
    for recorder, says in (
        (refuses, "operation not permitted"),
        (forgets, "a replay of LeNet5 is off by"),
    ):
        with pytest.raises(UsageError, match=says) as refused:
            graph_check.checked_recorder(trainer.window, train, lambda recorder=recorder: recorder)
        assert str(refused.value).startswith("trainer.graph=true: ")
        assert len(str(refused.value).splitlines()) == 1
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in before.items())
    assert all(p.grad is None for p in trainer.model.parameters())


def test_fused_optimizers_are_taken_where_nobody_chose() -> None:
    def fused(*overrides: str) -> object:
        return trainer_of(*overrides)[0].optimizer.defaults.get("fused")

    assert fused() is True and fused("optimizer=adamw") is True
    assert fused("optimizer=rmsprop") is None
    assert fused("+optimizer.fused=false") is False and fused("+optimizer.foreach=true") is None


@pytest.mark.slow
def test_a_compiled_model_trains_as_it_is() -> None:
    options = [
        "model=mlp",
        "accum.steps=3",
        "data.batch_size=100",
        "trainer.max_updates=12",
        "precision=fp64",
    ]
    plain, expected = trainer_of(*options)
    plain.fit()
    compiled, memory = trainer_of(*options, "trainer.compile=true")
    compiled.fit()
    assert compiled.model._compiled_call_impl is not None
    assert relative_error(weights(compiled), weights(plain)) <= 1e-11
    for key in ("train/loss", "eval/accuracy"):
        assert dict(memory.series(key)) == pytest.approx(dict(expected.series(key)), rel=1e-11)


def test_a_model_that_cannot_be_compiled_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def fails(*_: Any) -> Any:
        raise TorchDynamoException("InvalidCxxCompiler: none was found\n\nSet TORCHDYNAMO_VERBOSE=1")

    trainer, _ = trainer_of("trainer.max_updates=2")
    monkeypatch.setattr(trainer.model, "forward", fails)
    with pytest.raises(TrainingError) as refused:
        trainer.fit()
    assert str(refused.value) == (
        "trainer.compile=true: the model cannot be compiled: InvalidCxxCompiler: none was found; leave it out"
    )


def test_the_configuration_says_what_is_recorded() -> None:
    assert composed("trainer.compile=true").trainer.compile
