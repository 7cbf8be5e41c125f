"""Schedules of the learning rate follow their formulas, and the constant one is torch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from accumexp.training.schedules import constant

from ..support.experiments import trainer_of


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
