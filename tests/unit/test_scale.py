"""Law 6: an overflow in any micro-batch on any rank skips the window on all; the scale moves once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from accumexp.accum import LossScale, OptimizerStep, Window, data_parallel, fully_sharded, rank_share
from accumexp.errors import TrainingError
from accumexp.models import LeNet5
from accumexp.training.trainer_state import restore_trainer_state, trainer_state

from ..support.experiments import trainer_of, weights
from ..support.ranks import on_ranks
from ..support.reference import classification, relative_error, small_model

SAMPLES = 16
MARK = 7.5  # of a sample whose gradient is inf
WINDOWS = 8
SCALING: dict[str, Any] = {"init_scale": 1024.0, "growth_interval": 2}


class Overflowing(torch.autograd.Function):
    """Identity forward; backward, inf in the last column of the marked rows and nowhere else."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, marked: Tensor) -> Tensor:
        ctx.save_for_backward(marked)
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (marked,) = ctx.saved_tensors
        last = torch.arange(gradients[0].shape[1]) == gradients[0].shape[1] - 1
        return gradients[0].masked_fill(marked[:, None] & last, math.inf), None


class Model(nn.Module):
    """Overflows in one number of one parameter: sharded over two ranks, on the second alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_model()
        self.bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))
        # Of one number, so that the second rank's shard is empty.
        self.factor = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        bias: Any = Overflowing.apply(self.bias.expand(len(inputs), 5), inputs[:, 0] == MARK)
        return self.factor * self.body(inputs) + bias


def batch(window: int, overflows: dict[int, int]) -> tuple[Tensor, Tensor]:
    """The batch of a window; `overflows` says which sample of which window is marked."""
    inputs, targets = classification(SAMPLES + window)
    inputs, targets = inputs[:SAMPLES].clone(), targets[:SAMPLES]
    if window in overflows:
        inputs[overflows[window], 0] = MARK
    return inputs, targets


def by_hand(
    overflows: dict[int, int], make_optimizer: Any, windows: int = WINDOWS
) -> tuple[dict[str, Tensor], list[float]]:
    """The larger batch with a dynamic scale as a person would write it: weights, and the scale's path."""
    model = Model()
    optimizer = make_optimizer(model.parameters())
    scale, good, path = 1024.0, 0, []
    for window in range(windows):
        inputs, targets = batch(window, overflows)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(inputs), targets) * scale).backward()
        if all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters()):
            for p in model.parameters():
                p.grad = p.grad / scale if p.grad is not None else None
            optimizer.step()
            good += 1
            if good == 2:
                scale, good = scale * 2, 0
        else:
            scale, good = scale / 2, 0
        path.append(scale)
    return {name: p.detach() for name, p in model.named_parameters()}, path


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def fused_momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)


def fused_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01, fused=True)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


def scaled(
    overflows: dict[int, int], steps: int, make_optimizer: Any, how: str = "alone", windows: int = WINDOWS
) -> tuple[dict[str, Tensor], list[float], list[bool]]:
    """Weights, the scale's path, and whether each window changed a bit of weights or optimizer."""
    model: nn.Module = Model()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if how != "alone":
        model = data_parallel(model) if how == "adding" else fully_sharded(model, torch.device("cpu"))
    optimizer = make_optimizer(model.parameters())
    window = Window(model, nn.CrossEntropyLoss(), steps, loss_scale=LossScale(**SCALING))
    step = OptimizerStep(window, optimizer)
    assert window.loss_scale is not None
    path, changed = [], []
    for number in range(windows):
        rows = [sample for part in rank_share(SAMPLES, steps, rank, ranks) for sample in part]
        inputs, targets = batch(number, overflows)
        optimizer.zero_grad(set_to_none=not window.sync.keeps_gradients)
        before = snapshot(model, optimizer)
        window.backward(inputs[rows], targets[rows])
        result = step(want_norm=True)
        changed.append(snapshot(model, optimizer) != before)
        assert result.overflow is not None and bool(result.overflow) == (number in overflows)
        assert result.norm is not None and (number in overflows or 0 < float(result.norm) < 10), "unscaled"
        path.append(float(window.loss_scale.scale))
    parameters = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in parameters.items()}  # pyright: ignore
    return whole, path, changed


def test_fused_momentum_is_there_for_whoever_comes_later() -> None:
    """A new group, another state and a parameter whose momentum was taken away: each is seen anew."""
    torch.manual_seed(0)
    models = [nn.Linear(3, 2, dtype=torch.float64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    extra = [nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in models]
    plain, fused = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=kind)
        for model, kind in zip(models, (False, True), strict=True)
    )
    step = OptimizerStep(Window(models[1], nn.MSELoss(), 1), fused)

    def update() -> None:
        for model, more in zip(models, extra, strict=True):
            for p in (*model.parameters(), more):
                p.grad = p.detach() + 1
        plain.step()
        step()
        for one, other in zip(
            *[(*m.parameters(), e) for m, e in zip(models, extra, strict=True)], strict=True
        ):
            assert torch.allclose(one, other, rtol=1e-14, atol=0)

    update()
    update()
    for optimizer, more in zip((plain, fused), extra, strict=True):
        optimizer.add_param_group({"params": [more]})
    update()
    for optimizer in (plain, fused):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
    update()
    update()
    for optimizer, model in zip((plain, fused), models, strict=True):
        del optimizer.state[model.bias]
    update()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """All bits of weights and optimizer state; a state not made yet is as good as zeros."""
    state = [
        entry[key].tolist()
        for entry in optimizer.state.values()
        for key in sorted(entry)
        if isinstance(entry[key], Tensor) and bool(torch.count_nonzero(local(entry[key])))
        if not hasattr(entry[key], "full_tensor")
    ]
    return [[local(p.detach()).tolist() for p in model.parameters()], state]


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("make_optimizer", [momentum, fused_momentum, fused_adam, adamw])
def test_law_6_an_overflow_in_any_micro_batch_skips_the_window(steps: int, make_optimizer: Any) -> None:
    for k in range(steps):
        sample = rank_share(SAMPLES, steps, 0, 1)[k].start
        # The first window too, before the optimizer has any state.
        for overflows in ({3: sample}, {0: sample, 5: sample, 6: sample}):
            expected, path = by_hand(overflows, make_optimizer)
            parameters, scales, changed = scaled(overflows, steps, make_optimizer)
            assert scales == path
            assert changed == [window not in overflows for window in range(WINDOWS)]
            assert relative_error(parameters, expected) <= 1e-12


def every_place(how: str) -> dict[tuple[int, int, int], Any]:
    """The same with the overflow at every (micro-batch, rank), for 1 to 8 steps."""
    ranks = dist.get_world_size()
    return {
        (steps, k, rank): scaled(
            {1: rank_share(SAMPLES, steps, rank, ranks)[k].start}, steps, momentum, how, windows=3
        )
        for steps in range(1, 9)
        for k in range(steps)
        for rank in range(ranks)
    }


@pytest.mark.parametrize("how", ["adding", pytest.param("sharded", marks=pytest.mark.slow)])
def test_law_6_an_overflow_on_any_rank_skips_the_window_on_all(tmp_path: Path, how: str) -> None:
    for by_place in on_ranks(2, tmp_path, every_place, how):
        assert len(by_place) == 2 * 36
        for (steps, k, rank), (values, scales, changed) in by_place.items():
            sample = rank_share(SAMPLES, steps, rank, 2)[k].start
            expected, path = by_hand({1: sample}, momentum, windows=3)
            assert scales == path, (steps, k, rank)
            assert changed == [True, False, True]
            assert relative_error(values, expected) <= 1e-12


def test_law_6_the_scale_grows_by_updates_whatever_the_steps() -> None:
    for steps in (1, 2, 8):
        _, path, _ = scaled({}, steps, momentum)
        assert path == [1024, 2048, 2048, 4096, 4096, 8192, 8192, 16384]


def test_a_static_scale_stays_and_a_dynamic_one_does_not_fall_below_its_smallest() -> None:
    overflow = torch.tensor(True)
    static = LossScale(256.0, dynamic=False)
    dynamic = LossScale(4.0, min_scale=1.0)
    for _ in range(5):
        static.update(overflow)
        dynamic.update(overflow)
    assert float(static.scale) == 256 and static.counters().tolist() == [256, 5, 5, 5]
    assert dynamic.counters().tolist() == [1, 5, 3, 5], "in vain from the smallest scale on"
    dynamic.update(torch.tensor(False))
    assert dynamic.counters().tolist() == [1, 5, 0, 0]


def test_a_scale_does_not_grow_to_infinity() -> None:
    scale = LossScale(2.0**127, growth_interval=1)
    scale.update(torch.tensor(False))
    assert float(scale.scale) == 2.0**127


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init_scale": 0.0}, "init_scale"),
        ({"growth_factor": 1.0}, "growth_factor"),
        ({"backoff_factor": 1.0}, "backoff_factor"),
        ({"growth_interval": 0}, "growth_interval"),
        ({"min_scale": 2.0**20}, "min_scale"),
    ],
)
def test_a_scale_that_cannot_work_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        LossScale(**options)


@pytest.mark.parametrize("steps", [1, 4])
def test_fp16_autocast_stays_within_its_rounding_of_fp32(steps: int) -> None:
    """fp16 has 11 bits: 2^-11 a rounding, some dozens of them one after the other in LeNet-5."""
    torch.manual_seed(0)
    model = LeNet5()
    images, labels = torch.randn(32, 1, 32, 32), torch.randint(0, 10, (32,))
    nn.functional.cross_entropy(model(images), labels).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scale = LossScale()
    window = Window(model, nn.CrossEntropyLoss(), steps, autocast=torch.float16, loss_scale=scale)
    result = window.backward(images, labels)
    assert OptimizerStep(window, optimizer, clip_norm=1e6)(want_norm=True).overflow == torch.tensor(False)
    scaled_gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert relative_error(scaled_gradients, expected) <= 64 * 2**-11
    assert result.loss.item() == pytest.approx(
        nn.functional.cross_entropy(model(images), labels).item(), rel=2**-8
    )


def test_a_power_of_two_changes_no_bit_of_a_run() -> None:
    plain, _ = trainer_of("accum.steps=3", "trainer.epochs=1", "trainer.clip_norm=0.5")
    plain.fit()
    scaled_run, memory = trainer_of(
        "accum=loss_scaled", "accum.steps=3", "trainer.epochs=1", "trainer.clip_norm=0.5"
    )
    scaled_run.fit()
    assert relative_error(weights(scaled_run), weights(plain)) <= 1e-13
    assert memory.series("accum/loss_scale") == [(10, 65536.0), (11, 65536.0)]
    assert memory.series("accum/skipped_windows") == [(10, 0.0), (11, 0.0)]


@pytest.mark.parametrize("scaling", ["static", "dynamic"])
def test_a_run_whose_every_window_overflows_stops_with_a_clear_error(scaling: str) -> None:
    trainer, memory = trainer_of("accum=loss_scaled", f"accum.loss_scale={scaling}", "accum.init_scale=8")
    for parameter in trainer.model.parameters():
        parameter.register_hook(lambda gradient: gradient * math.inf)
    before = weights(trainer)
    with pytest.raises(TrainingError, match=r"every window overflows.*loss scale [18];"):
        trainer.fit()
    assert trainer.progress.update <= 20
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    assert memory.rows


def test_a_short_run_that_only_overflowed_is_no_success() -> None:
    trainer, _ = trainer_of("accum=loss_scaled", "trainer.max_updates=4", "callbacks=none")
    for parameter in trainer.model.parameters():
        parameter.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(TrainingError, match="4 of 4 were skipped"):
        trainer.fit()


def test_a_skipped_window_may_have_a_loss_that_is_not_finite() -> None:
    trainer, memory = trainer_of("accum=loss_scaled", "trainer.epochs=2", "accum.steps=4")
    train: Any = trainer.splits.train
    train.inputs[train.indices[5]] = math.inf
    trainer.fit()
    losses = [loss for _, loss in memory.series("train/loss")]
    assert sum(not math.isfinite(loss) for loss in losses) == 2, "once an epoch"
    assert memory.series("accum/skipped_windows")[-1] == (22, 2.0)
    assert memory.series("accum/loss_scale")[-1] == (22, 65536.0 / 4)


def test_law_8_the_scale_is_resumed() -> None:
    whole, _ = trainer_of("accum=loss_scaled", "accum.growth_interval=4", "trainer.max_updates=10")
    whole.fit()
    first, _ = trainer_of("accum=loss_scaled", "accum.growth_interval=4", "trainer.max_updates=6")
    first.fit()
    second, _ = trainer_of("accum=loss_scaled", "accum.growth_interval=4", "trainer.max_updates=10")
    restore_trainer_state(second, trainer_state(first))
    second.fit()
    assert second.window.loss_scale is not None and whole.window.loss_scale is not None
    assert second.window.loss_scale.state_dict() == whole.window.loss_scale.state_dict()
