"""Out of memory in a whole run: the update is made, said, kept, and remembered by the run and its resume."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from accumexp.errors import TrainingError, UsageError
from accumexp.training.callbacks import Callback
from accumexp.training.checkpoint import find, load
from accumexp.training.metrics_sink import MemoryMetricsSink
from accumexp.training.noise_scale import NoiseScale
from accumexp.training.out_of_memory import OutOfMemoryHandler
from accumexp.training.trainer import Trainer
from accumexp.training.trainer_state import restore_trainer_state, trainer_state

from ..support.command import journal, record_of, run_command
from ..support.experiments import composed, trainer_of, weights
from ..support.launched import SMALL, STATEFUL
from ..support.short import Starved
from ..support.trouble import trouble

OPTIONS = [
    *("model.dropout=0.3", "optimizer=adamw", "trainer.clip_norm=0.5", "data.batch_size=100"),
    *("accum.steps=4", "trainer.log_every=1", "trainer.max_updates=14"),
]


class FinerFrom(Callback):
    """Makes the windows from update `at` on as fine as after out of memory, without any."""

    def __init__(self, at: int, at_most: int) -> None:
        self.at, self.at_most = at, at_most

    def update_begin(self, trainer: Trainer) -> None:
        if trainer.progress.update + 1 == self.at:
            assert trainer.out_of_memory.recovery is not None
            trainer.out_of_memory.recovery.at_most = self.at_most


def run_of(callback: Callback, *overrides: str) -> tuple[Trainer, MemoryMetricsSink]:
    trainer, memory = trainer_of(*OPTIONS, *overrides)
    trainer.callbacks = {"noise": NoiseScale(), "callback": callback}
    random.seed(5)
    trainer.fit()
    return trainer, memory


MEASURED = ("perf/", "accum/")


def points(memory: MemoryMetricsSink) -> list[Any]:
    kept = [
        (update, {key: value for key, value in values.items() if not key.startswith(MEASURED)})
        for update, values, _ in memory.rows
    ]
    return [row for row in kept if row[1]]


@pytest.mark.parametrize(("at", "micro_batch"), [(1, 0), (3, 2), (13, 1)])
def test_a_run_goes_on_to_the_bits_of_one_that_was_split_finer_there(at: int, micro_batch: int) -> None:
    """Weights, draws, losses, accuracy and the noise scale; update 13 is the epoch's smaller last one."""
    size = 25 if at != 13 else 24
    starved, log = run_of(Starved(at, micro_batch))
    finer, expected = run_of(FinerFrom(at, -(-size // 2)))
    assert points(log) == points(expected)
    assert len(log.series("train/noise_scale")) + len(log.series("train/accuracy")) >= 14
    one, other = weights(starved), weights(finer)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert starved.progress.samples == finer.progress.samples == 12 * 100 + 93 + 100
    assert log.series("accum/steps") == [(at, 8)] and expected.series("accum/steps") == []


def test_it_is_said_kept_and_published_and_the_activations_are_measured_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accumexp.training.metrics_log.FIRST_UPDATES", 0)
    trainer, memory = run_of(Starved(5, 1, times=2), "trainer.log_every=7")
    lines = [
        "update 5: out of memory in micro-batch 2 of 4; from here on micro-batches of 13 samples at most",
        "update 5: out of memory in micro-batch 2 of 8; from here on micro-batches of 7 samples at most",
    ]
    assert capsys.readouterr().out.splitlines() == lines and trainer.out_of_memory.lines == lines
    assert trainer.out_of_memory.tags == {"accumexp.out_of_memory": "; ".join(lines)}
    assert memory.series("accum/steps") == [(5, 15)]
    assert [published for u, values, published in memory.rows if "accum/steps" in values] == [True]
    first = trainer_of(*OPTIONS)[0]
    first.update(next(iter(first.splits.train.epoch(0))))
    assert 0 < trainer.progress.activation_bytes < 0.3 * first.progress.activation_bytes
    assert [update for update, _ in memory.series("perf/activation_mib")] == [7]


def test_a_point_that_was_published_between_two_splits_has_the_measure_of_its_time() -> None:
    trainer, memory = run_of(Starved(9), "trainer.log_every=7")
    (first, coarse), (second, fine) = memory.series("perf/activation_mib")
    assert (first, second) == (7, 14) and fine < 0.6 * coarse


def test_state_of_a_run_that_was_split() -> None:
    trainer, _ = run_of(Starved(5))
    other, _ = trainer_of(*OPTIONS)
    restore_trainer_state(other, trainer_state(trainer))
    assert other.out_of_memory.lines == trainer.out_of_memory.lines
    assert other.out_of_memory.recovery is not None and other.out_of_memory.recovery.at_most == 13
    assert other.out_of_memory.steps_of(100) == 8


def test_what_no_split_can_mend_says_what_to_change() -> None:
    for overrides, callback, words in [
        ([], Starved(2, times=99), "update 2: out of memory .*one sample.*no finer split helps"),
        (["accum.recover=false"], Starved(2), "update 2: .*accum.steps=8 halves.*accum.recover=true"),
    ]:
        with pytest.raises(TrainingError, match=words):
            run_of(callback, *overrides)

    with pytest.raises(TrainingError, match="accum.steps=8 halves the micro-batches$"):
        run_of(Starved(2), "accum.reduction=sum")

    def short(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    trainer, _ = trainer_of(*OPTIONS)
    trainer.optimizer.register_step_pre_hook(short)
    with pytest.raises(TrainingError, match="optimizer's step .CUDA out of memory. Tried.: take one"):
        trainer.fit()
    trainer, _ = trainer_of(*OPTIONS)
    trainer.model.eval().register_forward_hook(short)
    with pytest.raises(TrainingError, match="evaluation on test.*lower data.eval_batch_size"):
        trainer.evaluate("test")


def test_a_model_in_shards_cannot_be_told_to_recover() -> None:
    with pytest.raises(UsageError, match="accum.recover=true: not with accum=fsdp"):
        composed("accum=fsdp", "accum.recover=true", "device=cpu")
    recovers = [
        composed(f"accum={how}", "device=cpu").accum.recovers for how in ("standalone", "ddp", "fsdp")
    ]
    assert recovers == [True, True, False]


def test_a_sum_of_means_keeps_its_steps() -> None:
    assert not composed("accum.reduction=sum", "device=cpu").accum.recovers
    for key in ("accum.recover=true", "accum.steps=auto"):
        with pytest.raises(UsageError, match=f"{key}: not with accum.reduction=sum"):
            composed("accum.reduction=sum", key, "device=cpu")


def test_recorded_windows_are_not_told_to_recover() -> None:
    trainer, _ = trainer_of(*OPTIONS)

    def short(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    batch = next(iter(trainer.splits.train.epoch(0)))
    with pytest.raises(TrainingError, match="halves the micro-batches$"):
        OutOfMemoryHandler(trainer.window, False, short).backward(1, batch, None)


def starved(at: int, micro_batch: int, rank: int | None = None) -> str:
    where = "" if rank is None else f", rank: {rank}"
    arguments = f"at: {at}, micro_batch: {micro_batch}{where}"
    return f"+callbacks.short={{_target_: tests.support.short.Starved, {arguments}}}"


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["update"], row["train/loss"]) for row in journal(run) if "train/loss" in row]


def test_law_8_stop_and_resume_after_out_of_memory_give_the_same_bits(tmp_path: Path) -> None:
    options = [*STATEFUL, "trainer.epochs=2", starved(5, 1)]
    whole = run_command("run", *options, "hydra.run.dir=whole", folder=tmp_path)
    assert whole.code == 0, whole
    line = "update 5: out of memory in micro-batch 2 of 2; from here on micro-batches of 32 samples at most"
    assert whole.stdout.count(line) == 2, "when it happens, and in the summary"
    record = record_of(tmp_path / "whole")
    assert record.tags["accumexp.out_of_memory"] == line
    assert record.points["accum/steps"] == [(5, 4)]
    assert "32 of 128" not in record.tags["accumexp.unequal"]
    stop = trouble("SIGTERM", 8)
    assert run_command("run", *options, stop, "hydra.run.dir=halves", folder=tmp_path).code == 143
    assert run_command("run", "resume=halves", "trust=[tests]", folder=tmp_path).code == 0
    one, other = (load(find(tmp_path / name)) for name in ("whole", "halves"))
    assert one["progress"]["update"] == other["progress"]["update"] == 22
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    assert record_of(tmp_path / "halves").tags["accumexp.out_of_memory"] == line
    assert one["shortage"] == other["shortage"]


@pytest.mark.slow
def test_several_ranks_go_on_and_shards_end_in_one_line(tmp_path: Path) -> None:
    options = [*SMALL, "tracking=none", "accum.steps=2", "accum.processes=2", "trainer.max_updates=4"]
    options += ["data.batch_size=400", starved(3, 1, rank=1)]
    done = run_command("run", "accum=ddp", *options, folder=tmp_path / "ddp")
    assert done.code == 0, done
    assert done.stdout.count("update 3: out of memory in micro-batch 2 of 2 on rank 1; from here on") == 2
    ended = run_command("run", "accum=fsdp", *options, folder=tmp_path / "fsdp")
    assert ended.code == 1 and ended.stderr.count("\n") == 1, ended
    assert "update 3: out of memory on rank 1" in ended.stderr and "accum.steps=4 halves" in ended.stderr
