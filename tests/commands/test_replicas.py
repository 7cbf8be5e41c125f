"""Many seeds trained as one: each is the run that it is alone, or a line says why it cannot be."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable as Function
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from accumexp.accum import Window
from accumexp.accum.loss import MeanOverSamples
from accumexp.accum.replica_window import ReplicaWindow
from accumexp.data import ResidentBatches
from accumexp.data.replica_batches import PlannedBatches
from accumexp.environment.ranks import RankInfo
from accumexp.errors import TrainingError
from accumexp.sweeps.sweep import sweep_runs
from accumexp.training.callbacks import Callback
from accumexp.training.checkpoint import save
from accumexp.training.components import placement
from accumexp.training.experiment import Experiment
from accumexp.training.metrics_sink import MemoryMetricsSink
from accumexp.training.replica_check import shared_splits
from accumexp.training.replica_trainer import ReplicaTrainer
from accumexp.training.trainer import Trainer
from accumexp.training.trainer_state import trainer_state

from ..support.command import Case, journal, left_behind, only_run, only_sweep, records, run_command, run_many
from ..support.experiments import composed
from ..support.reference import classification, small_model
from ..support.trouble import trouble
from .test_sweep import table

SEEDS = (3, 4, 5)
MLP = ["model=mlp", "model.hidden=[12]"]
SMALL = [
    "data.image_size=8",
    "data.batch_size=300",
    "trainer.epochs=3",
]  # 5 updates an epoch, the last of 93 samples
EXACT = 1e-10


class Orders(Callback):
    """Keeps which samples each update saw, and lets a test act before an update's window."""

    def __init__(self, act: Function[[Trainer], None] = lambda trainer: None) -> None:
        self.seen: list[Tensor] = []
        self.act = act

    def update_begin(self, trainer: Trainer) -> None:
        assert trainer.batch is not None
        self.seen.append(trainer.batch.indices.clone())
        self.act(trainer)


Runs = list[tuple[Trainer, MemoryMetricsSink, Orders]]


def built(overrides: list[str], joint: bool, act: Any = None) -> Runs:
    """A trainer on digits for each of `SEEDS`, in fp64 unless told otherwise; `act(seed, trainer)`."""
    runs: Runs = []
    every = composed("device=cpu", "precision=fp64", "callbacks=none", *overrides)
    shared = shared_splits(every, placement(every, RankInfo()), "replicas") if joint else None
    for seed in SEEDS:
        config, memory, splits = replace(every, seed=seed), MemoryMetricsSink(), shared
        if splits:
            assert isinstance(splits.train, ResidentBatches)
            splits = replace(splits, train=PlannedBatches(splits.train, seed))
        trainer = Experiment.build(config, splits=splits).trainer(memory)
        orders = Orders((lambda t, seed=seed: act(seed, t)) if act else lambda t: None)
        trainer.callbacks["orders"] = orders
        runs.append((trainer, memory, orders))
    return runs


def both(
    *overrides: str, act: Any = None, model: list[str] = MLP
) -> tuple[Runs, Runs, list[Exception | None]]:
    """The runs alone, the same together, and the errors that those together ended with, by replica."""
    alone, together = ([*built([*model, *SMALL, *overrides], joint, act)] for joint in (False, True))
    for trainer, _, _ in alone:
        try:
            trainer.fit()
        except TrainingError:
            assert act
    ended: dict[Trainer, Exception | None] = {}
    ReplicaTrainer([trainer for trainer, _, _ in together]).fit(ended.__setitem__)
    return alone, together, [ended[trainer] for trainer, _, _ in together]


def far(one: Any, other: Any) -> float:
    """The largest relative distance of two equally nested states."""
    if isinstance(one, Tensor):
        one, other = one.double(), other.double()
        return float((one - other).norm() / one.norm().clamp(min=1e-300))
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return max((far(value, other[key]) for key, value in one.items()), default=0.0)
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        return max(map(far, one, other), default=0.0)
    assert one == other
    return 0.0


def same(alone: Runs, together: Runs, bound: float = EXACT) -> None:
    """Weights, optimizer, schedule, order of the data and every point but times and memory."""
    for (trainer, memory, orders), (other, others, order) in zip(alone, together, strict=True):
        assert len(orders.seen) == len(order.seen) == trainer.progress.update > 0
        assert all(map(torch.equal, orders.seen, order.seen))
        one, two = trainer_state(trainer), trainer_state(other)
        for key in ("model", "optimizer", "loss_scale", "scheduler"):
            assert far(one[key], two[key]) <= bound, key
        assert len(memory.rows) == len(others.rows)
        for (update, values, publish), row in zip(memory.rows, others.rows, strict=True):
            assert (update, publish) == (row[0], row[2]) and values.keys() == row[1].keys()
            for key, value in values.items():
                if not key.startswith("perf/"):
                    assert row[1][key] == pytest.approx(value, rel=bound, abs=1e-300, nan_ok=True), key
    assert not torch.equal(alone[0][2].seen[0], alone[1][2].seen[0])


WEIGHTED = [
    "+loss.ignore_index=3",
    "+loss.weight={_target_:torch.tensor,data:[1.0,2.0,1.0,1.0,3.0,1.0,1.0,2.0,1.0,1.0]}",
]
LABELS = ["+loss.label_smoothing=0.1", "+loss.ignore_index=7"]
AUGMENT = ["+data.augment._target_=accumexp.data.ShiftAndFlip"]
WHOLE_RUNS = {
    "momentum": ["accum.steps=3"],
    "clipped adamw": ["optimizer=adamw", "accum.steps=4", "trainer.clip_norm=0.3", "scheduler=cosine"],
    "sum of means": ["accum.steps=4", "accum.reduction=sum", "optimizer=sgd"],
    "class weights": ["accum.steps=4", *WEIGHTED],
    "weighted sum of means": ["accum.steps=4", "accum.reduction=sum", *LABELS],
    "elementwise loss": ["accum.steps=2", "loss=mse", "optimizer=rmsprop"],
    "loss scale": ["accum=loss_scaled", "accum.steps=3", "accum.growth_interval=4", "trainer.clip_norm=1"],
    "augmented": ["accum.steps=2", *AUGMENT],
    "noise scale": ["accum.steps=3", "callbacks=noise_scale", "trainer.log_every=1"],
    "average": ["+callbacks.ema._target_=accumexp.training.callbacks.EMA", "optimizer=adam"],
    "another optimizer": ["optimizer=sgd", "optimizer._target_=torch.optim.Adafactor", "accum.steps=2"],
}


@pytest.mark.parametrize("overrides", WHOLE_RUNS.values(), ids=WHOLE_RUNS.keys())
def test_each_of_many_seeds_is_the_run_that_it_is_alone(overrides: list[str]) -> None:
    alone, together, errors = both(*overrides)
    assert errors == [None] * 3
    same(alone, together)


class Mixed(nn.Module):
    """BatchNorm, a weight that two layers share, and a parameter that nothing uses."""

    def __init__(self, inputs: int, num_classes: int, hidden: list[int], dropout: float) -> None:
        super().__init__()
        (width,) = hidden
        first = nn.Linear(inputs, width, bias=False)  # whose gradient would be nothing but rounding
        self.into = nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(width), nn.ReLU())
        self.once, self.again = nn.Linear(width, width), nn.Linear(width, width)
        self.again.weight = self.once.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.out = nn.Linear(width, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.again(self.once(self.into(inputs)).relu()))


class Scaled(Mixed):
    """With a parameter that is a single number."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * super().forward(inputs)


class Capped(Callback):
    """A hook of the optimizer that keeps the weights small after each step."""

    def run_begin(self, trainer: Trainer) -> None:
        def cap(*_: Any) -> None:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.clamp_(-0.05, 0.05)

        trainer.optimizer.register_step_post_hook(cap)


class ByLabel(MeanOverSamples):
    """Samples of the higher classes weigh twice."""

    def weight(self, targets: Any) -> Any:
        return (1 + (targets > 4)).sum()

    def total(self, outputs: Any, targets: Any) -> Tensor:
        losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return (losses * (1 + (targets > 4))).sum()


def by_label() -> ByLabel:
    return ByLabel(nn.CrossEntropyLoss())


def model_overrides(name: str) -> list[str]:
    return [*MLP, f"model._target_={__name__}.{name}"]


def test_a_parameter_of_a_single_number_is_clipped_with_the_others() -> None:
    alone, together, errors = both("accum.steps=3", "trainer.clip_norm=0.3", model=model_overrides("Scaled"))
    assert errors == [None] * 3
    same(alone, together)


def test_hooks_of_an_optimizer_are_heard_for_each_replica() -> None:
    alone, together, _ = both("accum.steps=3", f"+callbacks.cap._target_={__name__}.Capped")
    assert all(p.abs().max() <= 0.05 for trainer, _, _ in together for p in trainer.model.parameters())
    same(alone, together)


def test_what_a_loss_of_its_own_weighs_is_asked_for_each_replica() -> None:
    alone, together, _ = both("accum.steps=3", f"loss._target_={__name__}.by_label")
    same(alone, together)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_statistics_tied_weights_and_unused_parameters_are_those_of_the_run_alone(optimizer: str) -> None:
    decay = "optimizer.weight_decay=0.1"
    alone, together, _ = both(
        "accum.steps=3", f"optimizer={optimizer}", decay, model=model_overrides("Mixed")
    )
    same(alone, together)
    for (trainer, _, _), (other, _, _) in zip(alone, together, strict=True):
        assert other.model.get_buffer("into.2.num_batches_tracked") == 3 * (4 * 3 + 1)
        assert far(dict(trainer.model.named_buffers()), dict(other.model.named_buffers())) <= EXACT
        assert other.model.get_parameter("unused").eq(1).all()


def test_in_fp32_and_bf16_they_differ_by_rounding_alone() -> None:
    for precision, bound in (("fp32", 1e-4), ("bf16", 0.1)):
        alone, together, _ = both(f"precision={precision}", "accum.steps=2", "trainer.epochs=1")
        for (trainer, memory, _), (other, others, _) in zip(alone, together, strict=True):
            assert far(trainer.model.state_dict(), other.model.state_dict()) <= bound
            assert memory.series("train/loss") == [
                (update, pytest.approx(loss, rel=bound)) for update, loss in others.series("train/loss")
            ]


# What happens to one of them alone -----------------------------------------------------------------------


def damage(seed: int, update: int) -> Any:
    """Makes one sample of one update of one replica infinite."""

    def act(replica_seed: int, trainer: Trainer) -> None:
        if replica_seed == seed and trainer.progress.update == update:
            assert trainer.batch is not None
            assert isinstance(trainer.batch.inputs, Tensor)
            trainer.batch.inputs[5] = math.inf

    return act


def test_an_overflow_of_one_replica_skips_its_update_and_no_other() -> None:
    scaled = ["accum=loss_scaled", "accum.steps=3", "trainer.log_every=1"]
    alone, together, errors = both(*scaled, act=damage(4, 6))
    assert errors == [None] * 3
    skipped = [dict(memory.series("accum/skipped_windows"))[15] for _, memory, _ in together]
    assert skipped == [0, 1, 0]
    for one, other in zip(alone, together, strict=True):
        scales = [memory.series("accum/loss_scale") for _, memory, _ in (one, other)]
        assert scales[0] == scales[1]
    same(alone, together)


def test_a_replica_whose_loss_is_not_finite_fails_and_the_others_go_on() -> None:
    alone, together, errors = both("trainer.log_every=2", act=damage(3, 6))
    assert errors[1:] == [None, None] and "train/loss is" in str(errors[0])
    assert [trainer.progress.update for trainer, _, _ in together] == [8, 15, 15]
    same(alone[1:], together[1:])


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_replica_that_stops_early_leaves_and_the_others_go_on(optimizer: str) -> None:
    def act(seed: int, trainer: Trainer) -> None:
        if trainer.progress.update == {3: 9, 4: 4}.get(seed):
            trainer.stop("enough")

    alone, together, _ = both(f"optimizer={optimizer}", "accum.steps=2", act=act)
    assert [trainer.progress.update for trainer, _, _ in together] == [10, 5, 15]
    same(alone, together)
    storages = {trainer.model.get_parameter("layers.1.weight").data_ptr() for trainer, _, _ in together}
    assert len(storages) == 3


def test_a_learning_rate_that_one_replica_alone_has_is_used_for_it_alone() -> None:
    def act(seed: int, trainer: Trainer) -> None:
        if seed == 4 and trainer.progress.update == 6:
            trainer.scheduler.base_lrs = [0.003]

    alone, together, _ = both("optimizer=adam", "trainer.clip_norm=0.5", act=act)
    same(alone, together)
    assert [trainer.optimizer.param_groups[0]["lr"] for trainer, _, _ in together][1] == 0.003


def test_the_time_of_others_evaluations_is_nobodys_time() -> None:
    import time

    class Slow(Callback):
        def evaluated(self, trainer: Trainer, split: str, values: dict[str, float]) -> None:
            time.sleep(0.3)

    together = built([*MLP, *SMALL, "trainer.epochs=1"], True)
    for trainer, _, _ in together:
        trainer.callbacks["slow"] = Slow()
    ReplicaTrainer([trainer for trainer, _, _ in together]).fit(lambda trainer, error: time.sleep(0.3))
    assert max(trainer.progress.seconds for trainer, _, _ in together) < 0.3


# The stack -----------------------------------------------------------------------------------------------


def test_a_model_in_a_stack_is_a_model_and_its_checkpoint_holds_it_alone(tmp_path: Path) -> None:
    models = [nn.Linear(50, 40, dtype=torch.float64) for _ in range(8)]
    before = [model.weight.detach().clone() for model in models]
    joint = ReplicaWindow([Window(model, nn.CrossEntropyLoss(), 2) for model in models])
    assert all(map(torch.equal, before, (model.weight for model in models)))
    joint.parameters[0].detach()[3] = 7.0
    assert models[3].weight.eq(7).all() and not models[2].weight.eq(7).any()
    save(tmp_path / "one.pt", {"model": models[3].state_dict()})
    assert (tmp_path / "one.pt").stat().st_size < 2 * 50 * 40 * 8
    joint.keep([0, 5])
    joint.parameters[0].detach()[1] = 9.0
    assert models[5].weight.eq(9).all() and models[3].weight.eq(7).all()


def test_a_gradient_that_other_hands_have_cleared_is_seen_again() -> None:
    models = [nn.Linear(6, 3) for _ in range(2)]
    joint = ReplicaWindow([Window(model, nn.CrossEntropyLoss(), 1) for model in models])
    inputs, targets = torch.randn(2, 5, 6), torch.randint(0, 3, (2, 5))
    joint.backward(inputs, targets, steps=1)
    models[1].zero_grad()
    joint.backward(inputs, targets, steps=2)
    alone = torch.autograd.grad(nn.CrossEntropyLoss()(models[1](inputs[1]), targets[1]), models[1].weight)[0]
    assert models[1].weight.grad is not None
    assert torch.allclose(models[1].weight.grad, alone, atol=1e-6)


def test_a_parameter_that_a_window_does_not_use_has_no_gradient_in_it() -> None:
    class Switched(nn.Linear):
        on = True

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) if self.on else input[:, :3] * self.weight.sum()

    models = [Switched(6, 3) for _ in range(2)]
    joint = ReplicaWindow([Window(model, nn.CrossEntropyLoss(), 1) for model in models])
    batch = torch.randn(2, 5, 6), torch.randint(0, 3, (2, 5))
    for on in (True, False, True):
        for model in models:
            model.on = on
        joint.backward(*batch, steps=1)
        assert [p.grad is not None for p in (*joint.parameters, models[1].bias)] == [True, on, on]


# The command ---------------------------------------------------------------------------------------------

COMMAND = [*MLP, *SMALL, "precision=fp64", "tracking.system_metrics=false", "report.write=false"]


class Plain(nn.Module):
    def __init__(self, inputs: int, num_classes: int, hidden: list[int], dropout: float) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, num_classes)
        self.projection = torch.ones(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs.flatten(1) * self.projection)


class Looks(Plain):
    """Decides by its data."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs if inputs.sum() > -1e9 else -inputs)


class Aside(Plain):
    """Keeps random numbers where nobody sees them."""

    def __init__(self, inputs: int, num_classes: int, hidden: list[int], dropout: float) -> None:
        super().__init__(inputs, num_classes, hidden, dropout)
        self.projection = torch.randn(inputs, dtype=torch.float64)


class Drawn(TensorDataset):
    def __init__(self, train: bool, image_size: int) -> None:
        super().__init__(torch.randn(400, 1, image_size, image_size), torch.arange(400) % 10)


REFUSED = {
    "model.dropout=0.5": "layers.3 (Dropout) draws random numbers in training",
    f"model._target_={__name__}.Looks": "torch.func.vmap cannot run this model and loss for many seeds",
    f"model._target_={__name__}.Aside": "the gradient of layer.weight is not that of the run alone",
    f"data.train._target_={__name__}.Drawn": "the data draws from the run's seed",
    "data.resident=false": "this data is streamed",
    "accum=ddp": "take accum=standalone",
    "prove=true": "a certificate is of one run",
    "data.split_seed=${seed}": "data.split_seed follows from the seed",
    "optimizer.lr=fast": "optimizer",
    "accum.steps=0": "accum.steps=0: at least 1",
    "replicas=0": "replicas=0: at least 1",
}


@pytest.mark.slow
def test_what_cannot_be_trained_together_is_refused_in_a_line_and_leaves_nothing(tmp_path: Path) -> None:
    line = ["replicas=2", *MLP, *SMALL, "precision=fp64"]
    asked = [
        *REFUSED.items(),
        (f"resume={tmp_path}", "no checkpoint"),
        ("replicas=0", "replicas=0: at least 1"),
    ]
    cases = [Case("run", [*line, one], str(tmp_path / str(k))) for k, (one, _) in enumerate(asked)]
    cases.append(Case("prove", line, str(tmp_path / "prove")))
    reasons = [*(reason for _, reason in asked), "a certificate is of one run"]
    for case, done, reason in zip(cases, run_many(cases, tmp_path / "scratch"), reasons, strict=True):
        assert reason in done.error(), (case, done)
        assert left_behind(Path(case.folder)) == [], case


def test_replicas_are_child_runs_each_as_its_seed_alone_leaves_it(tmp_path: Path) -> None:
    done = run_command("run", "replicas=3", "seed=3", "accum.steps=2", *COMMAND, folder=tmp_path / "many")
    assert done.code == 0 and not done.stderr, done
    assert [row[:2] for row in table(done.stdout)] == [["2", "3"]]  # accum.steps, seeds
    parent, *children = records(tmp_path / "many")
    assert parent.status == "FINISHED" and len(children) == 3
    assert parent.tags["accumexp.command"].startswith("python -m accumexp.run replicas=3 seed=3")
    (tmp_path / "alone").mkdir()
    run_command("run", "seed=4", "accum.steps=2", *COMMAND, folder=tmp_path / "alone")
    (alone,) = records(tmp_path / "alone")
    for seed, child in zip(SEEDS, children, strict=True):
        assert child.status == "FINISHED" and child.tags["mlflow.parentRunId"] == parent.run_id
        assert (child.params["seed"], child.params["replicas"]) == (str(seed), "1")
        assert child.tags["accumexp.replicas"] == "3" and f"seed={seed}" in child.name
    child, alone_folder = children[1], only_run(tmp_path / "alone")
    folder = Path(child.tags["accumexp.folder"])
    assert folder.name == "seed=4"
    configs = [(run / "config.yaml").read_text() for run in (folder, alone_folder)]
    uri = f"  uri: sqlite:///{tmp_path / 'many' / 'mlflow.db'}\n"  # a sweep keeps to the store it began in
    assert configs[0].replace(uri, "  uri: null\n") == configs[1]
    assert child.artifacts == alone.artifacts and child.datasets == alone.datasets
    assert child.points.keys() == alone.points.keys()
    for key, points in alone.points.items():
        assert [step for step, _ in child.points[key]] == [step for step, _ in points]
        if not key.startswith(("perf/", "final/s", "final/update_ms", "final/peak", "final/activation")):
            assert [v for _, v in child.points[key]] == pytest.approx([v for _, v in points], rel=EXACT)
    # A replica is a run: it goes on by itself, as the one that was alone does.
    for base, run in (("many", folder), ("alone", alone_folder)):
        more = run_command("run", f"resume={run}", "trainer.epochs=4", folder=tmp_path / base)
        assert more.code == 0, more
    rows = [
        {k: v for k, v in row.items() if k[:5] in ("updat", "train", "eval/")}
        for row in journal(alone_folder)
    ]
    assert len(rows) == 24
    for row, other in zip(rows, journal(folder), strict=True):
        assert {key: other[key] for key in row} == pytest.approx(row, rel=EXACT)
    states = [torch.load(run / "checkpoints" / "update-00000020.pt") for run in (alone_folder, folder)]
    assert torch.equal(*(state["random"]["torch"] for state in states))


def test_a_sweep_of_replicas_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    stop = trouble("SIGTERM", 7, steps=2, mark=Path("mark"))
    line = ["accum.steps=1,2", "replicas=2", stop, *COMMAND, "tracking=none"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "mark-0").touch()
    undisturbed = run_command("run", "-m", *line, folder=tmp_path / "whole")
    assert undisturbed.code == 0, undisturbed
    done = run_command("run", "-m", *line, folder=tmp_path / "cut")
    assert done.code == 128 + signal.SIGTERM, done
    whole, sweep = only_sweep(tmp_path / "whole"), only_sweep(tmp_path / "cut")
    assert [job.status for job in sweep_runs(sweep)] == ["FINISHED"] * 2 + ["KILLED"] * 2
    assert done.stdout.splitlines()[-1].endswith(f"sweep.resume={sweep} trust=[tests]")
    again = run_command("run", "-m", f"sweep.resume={sweep}", "trust=[tests]", folder=tmp_path / "cut")
    assert again.code == 0 and again.stdout.count("finished before") == 1, again
    jobs, expected = sweep_runs(sweep), sweep_runs(whole)
    assert [job.status for job in jobs] == ["FINISHED"] * 4
    assert [job.overrides for job in jobs] == [job.overrides for job in expected]
    assert [job.seed for job in jobs] == [0, 1, 0, 1]
    for job, other in zip(jobs, expected, strict=True):
        rows, others = (journal(one.folder) for one in (job, other))
        assert [row["update"] for row in rows] == [row["update"] for row in others]
        for row, expected_row in zip(rows, others, strict=True):
            for key in row.keys() & {"train/loss", "eval/loss", "eval/accuracy"}:
                assert row[key] == pytest.approx(expected_row[key], rel=EXACT)
    assert [row[:2] for row in table(again.stdout)] == [["1", "2"], ["2", "2"]]


def test_failed_replicas_are_named_by_their_seeds(tmp_path: Path) -> None:
    line = ["replicas=3", *COMMAND, "tracking=none", "trainer.epochs=1", "optimizer.lr=1e200"]
    done = run_command("run", *line, folder=tmp_path)
    assert done.code == 1 and "3 of 3 jobs failed" in done.stderr, done
    assert [job.status for job in sweep_runs(only_sweep(tmp_path))] == ["FAILED"] * 3
    for seed in range(3):
        assert f"seed={seed}: train/loss is" in done.stderr


def test_what_a_callback_freezes_is_frozen_in_all_replicas() -> None:
    windows = [Window(small_model(seed=seed), nn.CrossEntropyLoss(), 2) for seed in (1, 2)]
    joint = ReplicaWindow(windows)
    inputs, targets = classification(8)
    batches = torch.stack([inputs, inputs]), torch.stack([targets, targets])
    for window in windows:
        next(window.model.parameters()).requires_grad_(False)
    joint.backward(*batches, steps=2)
    for window in windows:
        first, *others = window.model.parameters()
        assert first.grad is None and all(p.grad is not None for p in others)
    next(windows[0].model.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="frozen in some replicas"):
        joint.backward(*batches, steps=2)
