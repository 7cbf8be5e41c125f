"""Laws 3, 4 and 9 on the loop, and what a user expects of it."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from accumexp.accum import Window, window_loss
from accumexp.accum.loss import ClassIndexLoss
from accumexp.config.instantiate import build
from accumexp.data import ResidentBatches
from accumexp.errors import TrainingError, UsageError
from accumexp.training.callbacks import EMA, Callback, EarlyStopping
from accumexp.training.evaluation import Evaluator
from accumexp.training.metrics import Metrics
from accumexp.training.metrics_log import MetricsLog
from accumexp.training.metrics_sink import MemoryMetricsSink
from accumexp.training.progress import LoopOptions
from accumexp.training.progress_display import LossMonitor, ProgressBar
from accumexp.training.schedules import constant
from accumexp.training.trainer import Trainer
from accumexp.training.trainer_state import restore_trainer_state, trainer_state

from ..support.experiments import trainer_of, weights
from ..support.reference import relative_error


def plain_epoch(trainer: Trainer, epochs: int = 1, clip: float = math.inf) -> dict[str, Tensor]:
    """The same run written by hand: one large batch an update, momentum, no schedule."""
    model, data = trainer.model, trainer.splits.train
    rate, momentum = 0.05, 0.9
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    for epoch in range(epochs):
        for batch in data.epoch(epoch):

            def loss(parameters: dict[str, Tensor], batch: Any = batch) -> Tensor:
                outputs = torch.func.functional_call(model, parameters, (batch.inputs,))
                return nn.functional.cross_entropy(outputs, batch.targets)

            gradient = torch.func.grad(loss)(values)
            norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradient.values()))
            factor = min(1.0, clip / norm)
            for name, g in gradient.items():
                velocity[name] = momentum * velocity[name] + factor * g
                values[name] = values[name] - rate * velocity[name]
    return values


@pytest.mark.parametrize("batch", [100, 500])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_law_3_an_epoch_of_any_steps_ends_at_the_larger_batchs_weights(steps: int, batch: int) -> None:
    trainer, memory = trainer_of(f"data.batch_size={batch}", f"accum.steps={steps}", "trainer.epochs=1")
    assert len(trainer.splits.train) * batch > trainer.splits.train.samples, "the last window must be smaller"
    expected = plain_epoch(trainer)
    trainer.fit()
    assert relative_error(weights(trainer), expected) <= 1e-9
    assert trainer.progress.samples == trainer.splits.train.samples
    assert trainer.progress.update == len(trainer.splits.train) == len(memory.series("train/loss"))


class Halved(ClassIndexLoss):
    """Says of itself what its targets weigh."""

    def weight(self, targets: Any) -> Any:
        return 0.5 * super().weight(targets)


def halved() -> Halved:
    return Halved(nn.CrossEntropyLoss())


def test_law_2_a_loss_of_ones_own_is_asked_what_its_targets_weigh() -> None:
    trainer, memory = trainer_of("accum.steps=3", "trainer.max_updates=1", f"loss._target_={__name__}.halved")
    plain, expected = trainer_of("accum.steps=3", "trainer.max_updates=1")
    for one in (trainer, plain):
        one.fit()
    ((_, loss),), ((_, wanted),) = memory.series("train/loss"), expected.series("train/loss")
    assert loss == pytest.approx(2 * wanted, rel=1e-12)


def test_losses_are_read_as_they_were_however_many_wait() -> None:
    memory = MemoryMetricsSink()
    log = MetricsLog(Window(nn.Linear(1, 1), nn.MSELoss(), 1), Metrics({}), memory, True, {})
    for count in (1, 300, 128, 129):
        losses = torch.rand(count, dtype=torch.float32)
        for update, loss in enumerate(losses):
            log.add(update, loss, None, {"train/lr": 0.5})
        memory.rows.clear()
        log.read(count - 1, False, None)
        assert memory.series("train/loss") == list(enumerate(losses.tolist()))
    memory.rows.clear()
    log.read(0, False, None)
    assert not memory.rows


def test_a_constant_schedule_is_torchs_of_factor_one() -> None:
    made = [torch.optim.SGD([torch.ones(2)], lr=0.5) for _ in range(2)]
    for optimizer in made:
        optimizer.add_param_group({"params": [torch.ones(3)], "lr": torch.tensor(0.25)})
    ours, torchs = constant(made[0]), LambdaLR(made[1], lambda update: 1.0)
    for _ in range(3):
        for optimizer in made:
            optimizer.param_groups[0]["lr"] = 9.0
            optimizer.param_groups[1]["lr"].fill_(9.0)
            optimizer.step()
        ours.step()
        torchs.step()
        assert [[float(g["lr"]) for g in optimizer.param_groups] for optimizer in made] == [[0.5, 0.25]] * 2
        assert list(map(float, ours.get_last_lr())) == list(map(float, torchs.get_last_lr()))
    fresh = constant(made[0])
    for state in (ours.state_dict(), torchs.state_dict()):
        fresh.load_state_dict({**state, "base_lrs": [0.125, 0.25]})
        fresh.step()
        assert fresh.last_epoch == 4 and made[0].param_groups[0]["lr"] == 0.125


def test_a_run_that_goes_on_in_other_steps_measures_its_activations_anew() -> None:
    first, _ = trainer_of("accum.steps=2", "trainer.max_updates=3")
    first.fit()
    for steps, share in ((2, 1.0), (8, 0.25)):
        other, _ = trainer_of(f"accum.steps={steps}", "trainer.max_updates=6")
        restore_trainer_state(other, trainer_state(first))
        other.fit()
        measured = other.progress.activation_bytes / first.progress.activation_bytes
        assert measured == pytest.approx(share, rel=0.05)


class Outliving(nn.Module):
    """Counts its earlier outputs that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[Tensor]] = []
        self.alive = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.alive += sum(output() is not None for output in self.made)
        outputs = inputs.repeat(1, 3)
        self.made.append(weakref.ref(outputs))
        return outputs


def test_an_evaluation_keeps_no_outputs_through_the_next_forward() -> None:
    model, batches = Outliving(), ResidentBatches(torch.rand(9, 1), torch.zeros(9).long(), torch.arange(9), 2)
    evaluate = Evaluator(window_loss(nn.CrossEntropyLoss()), Metrics({}))
    assert evaluate(model, batches)["loss"] == pytest.approx(math.log(3))
    assert len(model.made) == 5 and not model.alive


class Seen(Callback):
    """Which samples each update saw, by what the model was given."""

    def __init__(self) -> None:
        self.windows: list[list[Tensor]] = []

    def run_begin(self, trainer: Trainer) -> None:
        trainer.model.register_forward_pre_hook(
            lambda module, inputs: self.windows[-1].append(inputs[0].detach()) if module.training else None
        )

    def update_begin(self, trainer: Trainer) -> None:
        self.windows.append([])


def test_law_3_no_sample_is_dropped_doubled_or_carried_over() -> None:
    trainer, _ = trainer_of("data.batch_size=100", "accum.steps=3", "trainer.epochs=1")
    seen = Seen()
    trainer.callbacks["seen"] = seen
    batches: list[Any] = [batch.inputs for batch in trainer.splits.train.epoch(0)]
    trainer.fit()
    assert [torch.cat(window).shape for window in seen.windows] == [batch.shape for batch in batches]
    assert all(torch.equal(torch.cat(w), b) for w, b in zip(seen.windows, batches, strict=True))
    assert [len(window) for window in seen.windows] == [3] * 12 + [3]
    assert sum(len(batch) for batch in batches) == trainer.splits.train.samples == 1293


@pytest.mark.parametrize("steps", [2, 8])
def test_law_4_everything_but_forward_and_backward_happens_once_an_update(steps: int) -> None:
    overrides = [
        "optimizer=adamw",
        "scheduler=warmup_cosine",
        "scheduler.warmup_updates=5",
        "trainer.clip_norm=0.5",
        "trainer.epochs=2",
        "trainer.log_every=1",
        "callbacks=ema",
        "callbacks.progress=null",
        "callbacks.monitor=null",
        "callbacks.checkpoint=null",
    ]
    runs = []
    for number in (1, steps):
        trainer, memory = trainer_of(*overrides, f"accum.steps={number}")
        trainer.fit()
        ema = trainer.callbacks["ema"]
        assert isinstance(ema, EMA) and isinstance(ema.average, AveragedModel)
        runs.append((weights(trainer), ema.average, memory, trainer))
    (large, large_ema, large_log, _), (small, small_ema, small_log, trainer) = runs
    assert relative_error(small, large) <= 1e-9
    assert relative_error(dict(small_ema.named_parameters()), dict(large_ema.named_parameters())) <= 1e-9
    assert int(small_ema.n_averaged) == trainer.progress.update == 22
    assert small_log.series("train/lr") == large_log.series("train/lr")
    for key in ("train/loss", "train/grad_norm", "eval/loss"):
        for (update, value), (same, expected) in zip(
            small_log.series(key), large_log.series(key), strict=True
        ):
            assert update == same and value == pytest.approx(expected, rel=1e-9)
    assert max(norm for _, norm in small_log.series("train/grad_norm")) > 0.5, "clipping must have had work"


def test_law_4_clipping_is_of_the_windows_gradient() -> None:
    trainer, memory = trainer_of(
        "accum.steps=4", "trainer.epochs=1", "trainer.clip_norm=0.1", "trainer.log_every=1"
    )
    expected = plain_epoch(trainer, clip=0.1)
    trainer.fit()
    # torch divides by the norm plus 1e-6 where the plain loop divides by the norm.
    assert relative_error(weights(trainer), expected) <= 1e-4
    assert min(norm for _, norm in memory.series("train/grad_norm")) > 0.1


def test_the_logged_loss_is_the_whole_windows() -> None:
    trainer, memory = trainer_of("accum.steps=5", "trainer.max_updates=1")
    batch = next(iter(trainer.splits.train.epoch(0)))
    assert isinstance(batch.targets, Tensor)
    before = nn.functional.cross_entropy(trainer.model(batch.inputs), batch.targets).item()
    trainer.fit()
    assert memory.series("train/loss") == [(1, pytest.approx(before, rel=1e-12))]


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for the device: reading a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("criterion", ["cross_entropy", "mse"])
def test_law_9_the_device_is_read_once_a_log_interval_whatever_the_steps(criterion: str) -> None:
    counts = {}
    for steps, log_every in [(1, 5), (8, 5), (8, 10)]:
        trainer, _ = trainer_of(
            f"loss={criterion}",
            f"accum.steps={steps}",
            f"trainer.log_every={log_every}",
            "trainer.max_updates=10",
            "trainer.epochs=9",
        )
        trainer.splits.eval.indices = trainer.splits.eval.indices[:1]
        with Waits() as waits:
            trainer.fit()
        counts[steps, log_every] = waits.count
    assert counts[1, 5] == counts[8, 5]
    assert counts[8, 10] < counts[8, 5]


def test_every_window_is_recorded_and_the_first_and_every_log_every_th_published() -> None:
    trainer, memory = trainer_of("trainer.max_updates=125", "trainer.log_every=50")
    trainer.fit()
    windows = [(u, published) for u, values, published in memory.rows if "train/loss" in values]
    assert windows == [(u, u <= 100 or u == 125) for u in range(1, 126)]


def test_what_costs_a_read_is_measured_every_log_every_th_update() -> None:
    trainer, memory = trainer_of("trainer.max_updates=25", "trainer.log_every=10")
    trainer.fit()
    for key in ("perf/samples_per_second", "perf/update_ms", "perf/peak_memory_mib", "train/accuracy"):
        assert [update for update, _ in memory.series(key)] == [10, 20, 25]
        assert all(value > 0 for _, value in memory.series(key))
    assert [update for update, _ in memory.series("perf/activation_mib")] == [10]


def test_evaluation_comes_every_eval_every_epochs_and_at_the_end() -> None:
    trainer, memory = trainer_of("trainer.epochs=5", "trainer.eval_every=2", "data.batch_size=500")
    trainer.fit()
    assert [update for update, _ in memory.series("eval/accuracy")] == [6, 12, 15]
    trainer, memory = trainer_of("trainer.max_updates=4", "data.batch_size=500")
    trainer.fit()
    assert [update for update, _ in memory.series("eval/accuracy")] == [3, 4]


def test_evaluation_counts_every_sample_once_and_leaves_the_model_training() -> None:
    trainer, _ = trainer_of("data.eval_batch_size=7", "model.dropout=0.5")
    inputs = torch.cat([batch.inputs for batch in trainer.splits.test.epoch(0)])  # pyright: ignore
    targets = torch.cat([batch.targets for batch in trainer.splits.test.epoch(0)])  # pyright: ignore
    trainer.model.train()
    values = trainer.evaluate("test")
    assert trainer.model.training
    with torch.no_grad():
        outputs = trainer.model.eval()(inputs)
    assert len(inputs) == 360
    assert values["test/loss"] == pytest.approx(
        nn.functional.cross_entropy(outputs, targets).item(), rel=1e-12
    )
    assert values["test/accuracy"] == pytest.approx((outputs.argmax(1) == targets).double().mean().item())


@pytest.mark.parametrize("mode", ["max", "min"])
def test_early_stopping_waits_patience_evaluations(mode: str) -> None:
    class Scripted(Callback):
        def evaluated(self, trainer: Trainer, split: str, values: dict[str, float]) -> None:
            values["eval/accuracy"] = scores.pop(0) * (1 if mode == "max" else -1)

    scores = [0.1, 0.5, 0.4, 0.5, 0.3, 0.9]
    trainer, memory = trainer_of("trainer.epochs=6", "data.batch_size=2000")
    trainer.callbacks = {"scripted": Scripted(), "stop": EarlyStopping(patience=3, mode=mode)}
    trainer.fit()
    assert trainer.progress.epoch == 5 and scores == [0.9]
    assert "early stopping" in str(trainer.stop_reason)


def test_a_loss_that_is_not_finite_fails_the_run_unless_told_otherwise() -> None:
    trainer, _ = trainer_of("optimizer.lr=1e200", "trainer.epochs=1")
    with pytest.raises(TrainingError, match="train/loss is nan at update"):
        trainer.fit()
    trainer, memory = trainer_of("optimizer.lr=1e200", "trainer.epochs=1", "trainer.check_finite=false")
    trainer.fit()
    assert math.isnan(memory.series("train/loss")[-1][1])


def test_events_come_in_order_and_only_to_those_who_listen() -> None:
    happened: list[str] = []

    class Listener(Callback):
        def run_begin(self, trainer: Trainer) -> None:
            happened.append("run_begin")

        def epoch_begin(self, trainer: Trainer) -> None:
            happened.append("epoch_begin")

        def update_begin(self, trainer: Trainer) -> None:
            happened.append("update_begin")

        def update_end(self, trainer: Trainer) -> None:
            happened.append("update_end")

        def measured(self, trainer: Trainer, values: dict[str, float]) -> None:
            happened.append("measured")

        def logged(self, trainer: Trainer, values: dict[str, float]) -> None:
            happened.append("logged")

        def evaluated(self, trainer: Trainer, split: str, values: dict[str, float]) -> None:
            happened.append(f"evaluated {split}")

        def epoch_end(self, trainer: Trainer) -> None:
            happened.append("epoch_end")

        def run_end(self, trainer: Trainer) -> None:
            happened.append("run_end")

    trainer, _ = trainer_of("trainer.epochs=1", "data.batch_size=1000", "trainer.log_every=2")
    trainer.callbacks = {"listener": Listener(), "quiet": Callback()}
    trainer.fit()
    assert [len(listeners) for listeners in trainer._events.values()] == [1] * 9
    assert happened == [
        "run_begin",
        "epoch_begin",
        "update_begin",
        "update_end",
        "update_begin",
        "measured",
        "logged",
        "update_end",
        "evaluated eval",
        "epoch_end",
        "run_end",
    ]


def test_the_loss_monitor_prints_at_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = trainer_of("trainer.max_updates=30", "trainer.log_every=4")
    trainer.callbacks["monitor"] = LossMonitor(every=10)
    trainer.fit()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("update")]
    assert [line.split()[1] for line in lines] == ["12/30", "20/30", "30/30"]
    assert all("loss" in line and "lr 0.05" in line and "updates/s" in line for line in lines)


@pytest.mark.parametrize(
    ("per_epoch", "epochs", "most", "expected"), [(10, 3, None, 30), (10, 3, 7, 7), (4, 2, 9, 8)]
)
def test_a_run_ends_at_whichever_comes_first(
    per_epoch: int, epochs: int, most: int | None, expected: int
) -> None:
    assert LoopOptions(epochs, most).total_updates(per_epoch) == expected


def test_schedules_follow_their_formulas_update_by_update() -> None:
    cosine = ["scheduler=cosine", "scheduler.min_factor=0.1", "trainer.max_updates=21", "trainer.log_every=1"]
    trainer, memory = trainer_of(*cosine)
    trainer.fit()
    for update, rate in memory.series("train/lr"):
        factor = 0.1 + 0.9 * (1 + math.cos(math.pi * (update - 1) / 20)) / 2
        assert rate == pytest.approx(0.05 * factor, rel=1e-12)
    warmup = ["scheduler=warmup_cosine", "scheduler.warmup_updates=4", "trainer.max_updates=12"]
    trainer, memory = trainer_of(*warmup)
    trainer.fit()
    rates = [rate for _, rate in memory.series("train/lr")]
    assert rates[:5] == [pytest.approx(0.05 * k / 4) for k in (1, 2, 3, 4, 4)]
    assert rates[-1] == pytest.approx(0.0, abs=1e-12)
    trainer, memory = trainer_of("scheduler=step", "scheduler.step_size=3", "trainer.max_updates=7")
    trainer.fit()
    assert [rate / 0.05 for _, rate in memory.series("train/lr")] == pytest.approx(
        [1, 1, 1, 0.5, 0.5, 0.5, 0.25]
    )


def test_precisions_train_and_keep_their_dtypes() -> None:
    for overrides, dtype in [
        (["precision=bf16"], torch.float32),
        (["precision=fp32"], torch.float32),
        (["precision=fp32", "param_precision=bf16", "accum.fp32_buffers=true"], torch.bfloat16),
    ]:
        trainer, memory = trainer_of("accum.steps=4", "trainer.epochs=3", *overrides)
        trainer.fit()
        assert {p.dtype for p in trainer.model.parameters()} == {dtype}
        losses = [loss for _, loss in memory.series("train/loss")]
        assert losses[-1] < 0.7 * losses[0]


def test_what_cannot_be_built_is_named() -> None:
    for overrides, named in [
        (["optimizer.lr=-1"], "optimizer .*Invalid learning rate"),
        (["monitor=eval/f1"], "monitor=eval/f1.*eval/accuracy, eval/loss"),
        (
            ["+callbacks.mine._target_=torch.nn.Identity"],
            "callbacks.mine.*no accumexp.callbacks.Callback",
        ),
        (["+metrics.mine._target_=torch.nn.Identity"], "metrics.mine.*torchmetrics"),
        (["model._target_=nowhere.Model"], "model._target_=nowhere.Model"),
        (["model._target_=builtins.dict"], "model: builtins.dict made a dict"),
        (["scheduler=warmup_cosine", "trainer.max_updates=3"], "scheduler.warmup_updates=50 of 3"),
        (["device=warp"], "device=warp"),
    ]:
        with pytest.raises(UsageError, match=named):
            trainer_of(*overrides)


@pytest.mark.parametrize("path", ["accumexp.display.Progress", "accumexp.training.progress_display.Progress"])
def test_the_progress_bar_of_earlier_configurations_is_still_found(path: str) -> None:
    assert isinstance(build({"_target_": path, "show": False}, "callbacks.progress"), ProgressBar)


def test_a_request_to_stop_counts_only_where_the_options_allow_it_or_it_is_forced() -> None:
    trainer, _ = trainer_of("trainer.max_updates=6", "data.batch_size=500")
    trainer.options = replace(trainer.options, may_stop=False)
    trainer.callbacks.update(stopping=StopAt(2, force=False), forced=StopAt(4, force=True))
    trainer.fit()
    assert (trainer.progress.update, trainer.stop_reason) == (4, "stop at 4")


class StopAt(Callback):
    def __init__(self, update: int, force: bool) -> None:
        self.update, self.force = update, force

    def update_end(self, trainer: Trainer) -> None:
        if trainer.progress.update == self.update:
            trainer.stop(f"stop at {self.update}", force=self.force)
