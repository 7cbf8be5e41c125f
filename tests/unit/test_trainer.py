"""Laws 2, 3 and 4 on the loop, its events, and what it cannot be built of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from accumexp.accum.loss import ClassIndexLoss
from accumexp.errors import UsageError
from accumexp.training.callbacks import EMA, Callback
from accumexp.training.trainer import Trainer

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
