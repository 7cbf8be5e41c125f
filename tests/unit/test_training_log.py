"""What a run logs, at which updates, and how often it reads the device for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from accumexp.accum import Window
from accumexp.config.instantiate import build
from accumexp.training.metrics import Metrics
from accumexp.training.metrics_log import MetricsLog
from accumexp.training.metrics_sink import MemoryMetricsSink
from accumexp.training.progress_display import LossMonitor, ProgressBar
from accumexp.training.trainer_state import restore_trainer_state, trainer_state

from ..support.experiments import trainer_of


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


def test_a_run_that_goes_on_in_other_steps_measures_its_activations_anew() -> None:
    first, _ = trainer_of("accum.steps=2", "trainer.max_updates=3")
    first.fit()
    for steps, share in ((2, 1.0), (8, 0.25)):
        other, _ = trainer_of(f"accum.steps={steps}", "trainer.max_updates=6")
        restore_trainer_state(other, trainer_state(first))
        other.fit()
        measured = other.progress.activation_bytes / first.progress.activation_bytes
        assert measured == pytest.approx(share, rel=0.05)


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


def test_the_loss_monitor_prints_at_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = trainer_of("trainer.max_updates=30", "trainer.log_every=4")
    trainer.callbacks["monitor"] = LossMonitor(every=10)
    trainer.fit()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("update")]
    assert [line.split()[1] for line in lines] == ["12/30", "20/30", "30/30"]
    assert all("loss" in line and "lr 0.05" in line and "updates/s" in line for line in lines)


@pytest.mark.parametrize("path", ["accumexp.display.Progress", "accumexp.training.progress_display.Progress"])
def test_the_progress_bar_of_earlier_configurations_is_still_found(path: str) -> None:
    assert isinstance(build({"_target_": path, "show": False}, "callbacks.progress"), ProgressBar)
