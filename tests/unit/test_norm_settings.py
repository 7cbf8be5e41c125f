"""The norms from the configuration: groups and momentum follow the window, wrong values are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from accumexp.config.loading import to_plain
from accumexp.config.overrides import with_overrides
from accumexp.config.schema import Config
from accumexp.errors import UsageError
from accumexp.models import NORMS, GhostBatchNorm2d, matched_momentum, norm_layer, resnet18, resnet50
from accumexp.training.experiment import Experiment
from accumexp.training.preflight import check_window_norms

from ..support.command import run_command
from ..support.experiments import composed, trainer_of, weights
from ..support.norms import M


def first_norm(*overrides: str) -> nn.Module:
    config = composed("device=cpu", *overrides)
    return built(config).get_submodule("bn1")


def built(config: Config) -> nn.Module:
    return Experiment.build(config).model


SMALL = ["optimizer.lr=0.001", "trainer.max_updates=2", "accum.steps=2", "data.batch_size=8"]
SMALL += ["data.eval_fraction=0.01", "trainer.log_every=1"]


@pytest.mark.parametrize("norm", NORMS)
def test_resnet18_composes_and_trains(norm: str) -> None:
    trainer, memory = trainer_of("model=resnet18", f"model.norm={norm}", "data.image_size=32", *SMALL)
    before = weights(trainer)
    trainer.fit()
    assert trainer.progress.update == 2 and len(memory.series("train/loss")) == 2
    after = weights(trainer)
    assert not torch.equal(before["fc.weight"], after["fc.weight"])
    if norm == "group":
        assert "bn1.running_mean" not in after
        return
    assert torch.equal(before["bn1.running_mean"], after["bn1.running_mean"]) == (norm == "frozen")
    assert not torch.equal(before["bn1.weight"], after["bn1.weight"])


@pytest.mark.parametrize(
    ("overrides", "steps", "micro"),
    [
        (["accum.steps=4"], 4, 32),
        (["accum.micro_batch_size=32", "data.batch_size=128"], 4, 32),
        (["accum.micro_batch_size=32", "accum.steps=4"], 4, 32),
        ([], 1, 128),
        (["accum=ddp", "accum.processes=2", "accum.micro_batch_size=16"], 4, 16),
        (["accum=ddp", "accum.processes=2", "data.batch_size=101", "accum.steps=2"], 2, 26),
        (["accum=loss_scaled", "accum.steps=8"], 8, 16),
    ],
    ids=str,
)
def test_the_window_of_the_configuration_sets_momentum_and_groups(
    overrides: list[str], steps: int, micro: int
) -> None:
    config = composed("model=resnet18", "model.norm=ghost", "device=cpu", *overrides)
    assert (config.accum.steps, config.model["ghost_size"]) == (steps, micro)
    ghost = built(config).get_submodule("bn1")
    assert isinstance(ghost, GhostBatchNorm2d)
    assert (ghost.ghost_size, ghost.momentum) == (micro, matched_momentum(M, steps))
    config.model["norm"] = "batch"
    batch = built(config).get_submodule("bn1")
    assert isinstance(batch, nn.BatchNorm2d) and batch.momentum == matched_momentum(M, steps)


@pytest.mark.parametrize("asked", ["--help", "--cfg=job"])
def test_what_only_shows_the_configuration_imports_no_torch(asked: str, tmp_path: Path) -> None:
    flags, chosen = ["-X", "importtime"], ["model=resnet18", "accum=ddp"]
    done = run_command("run", *chosen, *asked.split("="), folder=tmp_path, flags=flags)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.code == 0 and "norm: batch" in done.stdout
    assert "accumexp" in imported and imported.isdisjoint({"torch", "torchvision"})


def test_a_window_of_one_step_has_the_groups_that_are_asked_for() -> None:
    norm = first_norm("model=resnet18", "model.norm=ghost", "model.ghost_size=32", "model.momentum=0.2")
    assert isinstance(norm, GhostBatchNorm2d)
    assert (norm.ghost_size, norm.momentum) == (32, matched_momentum(0.2, 4))


def test_a_resumed_run_keeps_its_groups_and_matches_its_momentum_anew() -> None:
    plain = to_plain(composed("model=resnet18", "model.norm=ghost", "accum.steps=4", "device=cpu"))
    config = with_overrides(plain, ["accum.steps=2"])
    assert (config.accum.micro_batch_size, config.model["ghost_size"]) == (64, 32)
    norm = built(config).get_submodule("bn1")
    assert isinstance(norm, GhostBatchNorm2d) and norm.momentum == matched_momentum(M, 4)
    batch = with_overrides({**plain, "model": {**plain["model"], "norm": "batch"}}, ["accum.steps=2"])
    assert built(batch).get_submodule("bn1").momentum == matched_momentum(M, 2)


def test_group_norm_has_the_groups_that_are_asked_for() -> None:
    norm = first_norm("model=resnet50", "model.norm=group", "model.groups=16")
    assert isinstance(norm, nn.GroupNorm) and (norm.num_groups, norm.num_channels) == (16, 64)
    few = norm_layer("group", groups=32)(8)
    assert isinstance(few, nn.GroupNorm) and few.num_groups == 8


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.norm=layer", "model.norm=layer: one of batch, frozen, group, ghost"),
        ("model.groups=24", "model.groups=24: does not divide 64 channels"),
        ("model.groups=0", "model.groups=0: of channels, at least 1"),
        ("model.momentum=2", "model.momentum=2: a number from 0 to 1, the share of an update"),
        ("model.ghost_size=0", "model.ghost_size=0: samples in a group of statistics, at least 1"),
        ("model.ghost_size=half", "model.ghost_size=half: samples in a group of statistics, at least 1"),
        ("accum.steps=500", "accum.steps=500: data.batch_size=128 samples cannot be split into more"),
    ],
)
def test_a_wrong_value_gets_a_line_that_names_its_key(override: str, says: str) -> None:
    norm = {"groups": "group", "ghost_size": "ghost"}.get(override.partition("=")[0][6:], "batch")
    chosen = [] if "norm" in override else [f"model.norm={norm}"]
    with pytest.raises(UsageError) as refused:
        built(composed("model=resnet18", "device=cpu", *chosen, override))
    assert str(refused.value).startswith(says) and len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("channels", [3, 1])
def test_a_resnet_with_batch_norm_is_torchvisions(channels: int) -> None:
    import torchvision.models

    for ours, theirs in [(resnet18, torchvision.models.resnet18), (resnet50, torchvision.models.resnet50)]:
        torch.manual_seed(0)
        model = ours(num_classes=7, channels=channels)
        torch.manual_seed(0)
        other = theirs(num_classes=7)
        values = {
            name: v for name, v in model.state_dict().items() if channels == 3 or name != "conv1.weight"
        }
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in values.items())
        first = model.get_parameter("conv1.weight")
        assert first.shape == (64, channels, 7, 7)
        assert first.std().item() == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.1)  # He et al. 2015


@pytest.mark.slow
def test_single_samples_have_gradients_under_frozen_statistics() -> None:
    small = [
        "data.image_size=32",
        *SMALL,
        "+callbacks.noise._target_=accumexp.training.sample_noise_scale.SampleNoiseScale",
    ]
    trainer, memory = trainer_of("model=resnet18", "model.norm=frozen", *small)
    trainer.fit()
    variances = memory.series("train/gradient_variance")  # nothing where 8 samples say |G|^2 < 0
    assert variances and all(variance > 0 for _, variance in variances)
    with pytest.raises(UsageError, match="no gradient of a single sample where GhostBatchNorm2d bn1"):
        trainer_of("model=resnet18", "model.norm=ghost", *small)


@pytest.mark.parametrize(
    "setting", ["accum=fsdp", "trainer.compile=true", "trainer.graph=true", "replicas=2"]
)
def test_settings_that_statistics_of_the_window_exclude(setting: str) -> None:
    config = composed("model=resnet18", "model.norm=window", "device=cpu", "data.image_size=32", setting)
    with pytest.raises(UsageError) as refused:
        check_window_norms(Experiment.build(config))
    key = setting.partition("=")[0] if setting.startswith("replicas") else setting
    assert str(refused.value).startswith(f"{key}: the model has BatchNorm over the window")
