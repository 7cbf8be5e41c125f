"""Parameters with names, schedules that take the metric, and what is refused before update 1."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accumexp.accum import OptimizerStep, Window
from accumexp.errors import UsageError
from accumexp.training import checkpoint
from accumexp.training.experiment import Experiment
from accumexp.training.optimizers import CombinedOptimizer, build_optimizer, learning_rates
from accumexp.training.preflight import check_experiment, smallest_micro_batch, workers_warning
from accumexp.training.trainer_state import restore_trainer_state, trainer_state

from ..support.experiments import composed, trainer_of, weights

SGD = "torch.optim.SGD"


def network() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(12, 6, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(3, (12,), generator=generator)


def built(node: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(node, list(model.named_parameters()), model.modules())


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


NODE: dict[str, Any] = {"_target_": SGD, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, updates: range, **clip: float
) -> None:
    window = Window(model, nn.CrossEntropyLoss(), steps)
    step = OptimizerStep(window, optimizer, **clip)
    for update in updates:
        optimizer.zero_grad()
        window.backward(*batch(update))
        step()


def train_whole(model: nn.Module, optimizers: list[torch.optim.Optimizer], updates: int) -> None:
    for update in range(updates):
        inputs, targets = batch(update)
        model.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        for optimizer in optimizers:
            optimizer.step()


def test_groups_by_name_make_the_update_of_groups_made_by_hand() -> None:
    groups = [{"params": "*.bias", "weight_decay": 0.0}, {"params": ["2.*"], "lr": 0.02, "name": "head"}]
    model, larger = network(), network()
    optimizer = built({**NODE, "groups": groups}, model)
    assert all(group["fused"] for group in optimizer.param_groups)
    train(model, optimizer, 4, range(5))
    named = dict(larger.named_parameters())
    by_hand = [
        {"params": [named["0.weight"]]},
        {"params": [named["0.bias"], named["2.bias"]], "weight_decay": 0.0},
        {"params": [named["2.weight"]], "lr": 0.02},
    ]
    train_whole(larger, [torch.optim.SGD(by_hand, lr=0.1, momentum=0.9, weight_decay=0.1)], 5)
    assert_same(model, larger)
    assert learning_rates(optimizer) == {"train/lr": 0.1, "train/lr/1": 0.1, "train/lr/head": 0.02}


def combined(model: nn.Module) -> torch.optim.Optimizer:
    muon = {"params": "*.weight", "_target_": "torch.optim.Muon", "lr": 0.02, "name": "muon"}
    return built({"_target_": "torch.optim.AdamW", "lr": 0.01, "groups": [muon]}, model)


def test_two_optimizers_over_two_sets_make_the_updates_of_each_and_resume_to_the_bit() -> None:
    model, larger = network(), network()
    optimizer = combined(model)
    assert isinstance(optimizer, CombinedOptimizer)
    train(model, optimizer, 4, range(3))
    saved = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], saved)
    train(model, optimizer, 4, range(3, 6))
    named = dict(larger.named_parameters())
    muon = torch.optim.Muon([named["0.weight"], named["2.weight"]], lr=0.02)
    adam = torch.optim.AdamW([named["0.bias"], named["2.bias"]], lr=0.01)
    train_whole(larger, [muon, adam], 6)
    # Muon computes in bf16 inside, which turns a last bit of the gradient into a large step.
    for name in ("0.bias", "2.bias"):
        torch.testing.assert_close(dict(model.named_parameters())[name], named[name], rtol=0.02, atol=0.002)
    resumed = network()
    again = combined(resumed)
    saved.seek(0)
    weights_then, state = torch.load(saved, weights_only=True)
    resumed.load_state_dict(weights_then)
    again.load_state_dict(state)
    train(resumed, again, 4, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert learning_rates(again) == {"train/lr": 0.01, "train/lr/muon": 0.02}


def test_two_optimizers_of_elementwise_rules_make_exactly_the_updates_of_each() -> None:
    model, larger = network(), network()
    entry = {"params": "*.weight", "_target_": SGD, "lr": 0.05, "momentum": 0.9}
    train(model, built({"_target_": "torch.optim.AdamW", "lr": 0.01, "groups": [entry]}, model), 4, range(5))
    named = dict(larger.named_parameters())
    sgd = torch.optim.SGD([named["0.weight"], named["2.weight"]], lr=0.05, momentum=0.9)
    adam = torch.optim.AdamW([named["0.bias"], named["2.bias"]], lr=0.01)
    train_whole(larger, [sgd, adam], 5)
    assert_same(model, larger)


@pytest.mark.parametrize(
    ("groups", "line"),
    [
        ([{"params": "*.bais", "lr": 1.0}], "optimizer.groups.0.params=*.bais: matches none"),
        ([{"lr": 1.0}], "optimizer.groups.0={'lr': 1.0}: names no parameters"),
        (
            [{"params": "*"}, {"params": "*.bias"}],
            "optimizer.groups.1.params=*.bias: earlier groups take all",
        ),
        ([{"params": "*.bias", "weight_deacy": 0.0}], "optimizer.groups: weight_deacy is no setting"),
    ],
)
def test_groups_that_cannot_be_are_refused_by_name(groups: list[Any], line: str) -> None:
    with pytest.raises(UsageError) as refused:
        built({**NODE, "groups": groups}, network())
    assert str(refused.value).startswith(line)


def from_names(params: Any, named_parameters: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    names = {id(p): name for name, p in named_parameters}
    params = list(params)
    biases = [p for p in params if names[id(p)].endswith("bias")]
    others = [p for p in params if not names[id(p)].endswith("bias")]
    return torch.optim.SGD([{"params": others}, {"params": biases, "lr": 10 * lr}], lr=lr)


def test_a_factory_gets_the_named_parameters_it_asks_for() -> None:
    optimizer = built({"_target_": f"{__name__}.from_names", "groups": []}, network())
    assert learning_rates(optimizer) == {"train/lr": 0.1, "train/lr/1": 1.0}


def test_clip_value_clamps_the_windows_gradient_once_after_clip_norm() -> None:
    model, larger = network(), network()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 4, range(3), clip_norm=0.5, clip_value=0.02)
    optimizer = torch.optim.SGD(larger.parameters(), lr=0.1)
    for update in range(3):
        inputs, targets = batch(update)
        optimizer.zero_grad()
        nn.functional.cross_entropy(larger(inputs), targets).backward()
        nn.utils.clip_grad_norm_(larger.parameters(), 0.5)
        nn.utils.clip_grad_value_(larger.parameters(), 0.02)
        optimizer.step()
    assert_same(model, larger)


NO_SETTINGS = ("optimizer=sgd", "~optimizer.weight_decay")
PLATEAU = (
    "scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau",
    "+scheduler.patience=0",
    "+scheduler.threshold=1.0",
    "data.batch_size=500",
)


def test_a_plateau_is_stepped_once_an_evaluation_with_the_monitored_value() -> None:
    trainer, memory = trainer_of(*PLATEAU, "trainer.epochs=3", "monitor=eval/loss", "mode=min")
    trainer.fit()
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.05)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, patience=0, threshold=1.0)
    rates = []
    per_epoch = len(trainer.splits.train)
    for _, value in memory.series("eval/loss"):
        rates += [reference.param_groups[0]["lr"]] * per_epoch
        plateau.step(value)
    assert [rate for _, rate in memory.series("train/lr")] == rates
    assert len(set(rates)) > 1
    state = trainer_state(trainer)
    assert state["scheduler"]["num_bad_epochs"] == plateau.num_bad_epochs
    again, _ = trainer_of(*PLATEAU, "trainer.epochs=3", "monitor=eval/loss", "mode=min")
    restore_trainer_state(again, state)
    assert again.optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]


def test_the_mode_of_a_plateau_is_that_of_the_metric() -> None:
    trainer, _ = trainer_of(*PLATEAU)
    assert trainer.scheduler.scheduler.mode == "max"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            [*NO_SETTINGS, "optimizer._target_=torch.optim.LBFGS"],
            "optimizer._target_=torch.optim.LBFGS: its step needs a closure",
        ),
        (["monitor=eval/ema_accuracy"], "monitor=eval/ema_accuracy: nothing averages the weights"),
        (
            ["+callbacks.stop={_target_:accumexp.training.callbacks.EarlyStopping,monitor:eval/acuracy}"],
            "callbacks.stop.monitor=eval/acuracy: this run evaluates eval/accuracy, eval/loss",
        ),
    ],
)
def test_what_would_fail_in_the_run_is_refused_before_it(overrides: list[str], line: str) -> None:
    with pytest.raises(UsageError) as refused:
        trainer_of(*overrides)
    assert str(refused.value).startswith(line)


def test_one_sample_for_a_batch_norm_is_refused_before_update_1() -> None:
    trainer, _ = trainer_of("data.batch_size=64", "accum.steps=8")
    train = trainer.splits.train
    assert smallest_micro_batch(train, 64, 1) == smallest_micro_batch(train, 32, 2) == 1
    assert smallest_micro_batch(train, 1, 1) == train.samples % 64
    common = ("device=cpu", f"model._target_={__name__}.normed", "data.batch_size=64")
    check_experiment(Experiment.build(composed(*common, "accum.steps=8", "data.drop_last=true")))
    experiment = Experiment.build(composed(*common, "accum.steps=64"))
    with pytest.raises(
        UsageError, match=r"^data\.batch_size=64: with accum\.steps=64 .*data\.drop_last=true"
    ):
        check_experiment(experiment)


def normed(**settings: Any) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))


def test_workers_beyond_the_cores_are_warned_of_by_key() -> None:
    assert workers_warning(0) is None
    assert str(workers_warning(100_000)).startswith("data.workers=100000: this machine has ")


def test_sparse_tensors_are_saved_and_read_to_the_bit(tmp_path: Path) -> None:
    table = nn.Embedding(20, 4, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1, momentum=0.9)
    table(torch.tensor([3, 5, 3])).sum().backward()
    optimizer.step()
    checkpoint.save(tmp_path / "a.pt", {"optimizer": optimizer.state_dict()})
    read = checkpoint.load(tmp_path / "a.pt")["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(read.to_dense(), optimizer.state[table.weight]["momentum_buffer"].to_dense())


class ScheduleFree(torch.optim.SGD):
    """Refuses a step out of train mode."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.modes: list[str] = []

    def train(self) -> None:
        self.modes.append("train")

    def eval(self) -> None:
        self.modes.append("eval")

    def step(self, closure: Any = None) -> Any:
        assert self.modes[-1] == "train"
        return super().step(closure)


def test_a_schedule_free_optimizer_trains_in_train_mode_and_is_evaluated_in_eval_mode() -> None:
    trainer, _ = trainer_of(*NO_SETTINGS, f"optimizer._target_={__name__}.ScheduleFree", "trainer.epochs=2")
    seen = []
    evaluator = trainer.evaluator

    def evaluate(*arguments: Any) -> Any:
        seen.append(trainer.optimizer.modes[-1])  # pyright: ignore[reportAttributeAccessIssue]
        return evaluator(*arguments)

    trainer.evaluator = evaluate  # pyright: ignore[reportAttributeAccessIssue]
    before = weights(trainer)
    trainer.fit()
    assert seen == ["eval"] * 2
    assert any(not torch.equal(a, b) for a, b in zip(before.values(), weights(trainer).values(), strict=True))
