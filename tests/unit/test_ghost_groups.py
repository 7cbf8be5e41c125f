"""Law 10: ghost batch norm is named where its groups of statistics differ, and only there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from accumexp.accum import Window, inequalities
from accumexp.models import FrozenBatchNorm2d, GhostBatchNorm2d
from accumexp.report.groups import Group
from accumexp.report.jobs import Job
from accumexp.report.trajectory import declared_differences

from ..support.command import run_command
from ..support.norms import floats, images
from ..support.reference import gradients, larger_batch, relative_error


@given(st.integers(2, 40), st.integers(2, 6), st.integers(1, 20))
def test_law_10_ghost_is_named_where_its_groups_differ_and_only_there(
    samples: int, steps: int, ghost_size: int
) -> None:
    steps = min(steps, samples)
    torch.manual_seed(samples)
    model = nn.Sequential(
        GhostBatchNorm2d(2, ghost_size), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )
    model, (inputs, targets) = model.double(), images(samples)
    targets %= 3
    gradient, buffers = larger_batch(model, nn.functional.cross_entropy, inputs, targets)
    Window(model, nn.CrossEntropyLoss(), steps).backward(inputs, targets)
    off = max(
        relative_error(gradients(model), gradient),
        relative_error(floats(dict(model.named_buffers())), floats(buffers)),
    )
    assert off > 1e-9 if inequalities(model, samples, steps) else off <= 1e-12


def test_law_10_the_reasons_of_ghost() -> None:
    def reasons(ghost_size: int, samples: int, steps: int, **more: int) -> list[str]:
        model = nn.Sequential(GhostBatchNorm2d(3, ghost_size))
        return [difference.reason for difference in inequalities(model, samples, steps, **more)]

    assert reasons(32, 128, 4) == reasons(16, 128, 4) == reasons(32, 128, 4, last=37) == []
    assert reasons(32, 96, 4) == ["other groups of statistics in micro-batches of 24 than in all 96 samples"]
    assert reasons(16, 128, 4, last=37) == [
        "other groups of statistics in micro-batches of 19 than in all 37 samples"
    ]
    assert reasons(32, 128, 2, ranks=2) == ["running statistics over the samples of one rank alone"]
    assert reasons(64, 128, 2, ranks=2) == [
        "other groups of statistics in micro-batches of 32 than in all 128 samples"
    ]
    assert reasons(32, 128, 1) == [] and inequalities(GhostBatchNorm2d(3, 32).eval(), 96, 4) == []
    assert inequalities(nn.Sequential(FrozenBatchNorm2d(3), nn.GroupNorm(1, 3)).train(), 128, 4) == []


@pytest.mark.slow
@pytest.mark.parametrize("drop_last", [False, True])
def test_law_10_a_run_says_that_its_last_batch_has_other_groups(drop_last: bool, tmp_path: Path) -> None:
    """1,293 samples in batches of 100 leave 93, whose halves of 47 and 46 are not cut as 93 are."""
    sizes = ["data.batch_size=100", "accum.steps=2", "model.ghost_size=10", f"data.drop_last={drop_last}"]
    short = ["trainer.max_updates=1", "callbacks=none", "tracking=none", "device=cpu"]
    done = run_command("run", "model=resnet18", "model.norm=ghost", *sizes, *short, folder=tmp_path)
    assert done.code == 0, done
    named = "bn1 (GhostBatchNorm2d): other groups of statistics in micro-batches of 47 than in all 93 samples"
    assert (f"not the larger batch: {named}" in done.stdout) != drop_last
    assert ("not the larger batch" in done.stdout) != drop_last


def test_runs_of_other_groups_are_declared_to_be_other_trainings() -> None:
    def group(steps: int, ghost_size: int, norm: str = "ghost") -> Group:
        params = {"accum.steps": str(steps), "data.batch_size": "128", "model.norm": norm}
        params["model.ghost_size"] = str(ghost_size)
        return Group({"accum.steps": str(steps)}, {0: Job(None, "FINISHED", {}, params)})

    assert declared_differences(group(4, 32), group(1, 128)) == ["model.ghost_size"]
    assert (
        declared_differences(group(4, 32), group(1, 32))
        == declared_differences(group(4, 32, "group"), group(1, 128, "group"))
        == []
    )
