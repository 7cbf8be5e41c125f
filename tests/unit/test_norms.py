"""The four norms: three of them give any split of a batch the whole batch's gradient and buffers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from accumexp.accum import Window, inequalities, split_sizes, steps_for
from accumexp.config.loading import to_plain
from accumexp.config.overrides import with_overrides
from accumexp.config.schema import Config
from accumexp.errors import UsageError
from accumexp.models import (
    NORMS,
    FrozenBatchNorm2d,
    GhostBatchNorm2d,
    matched_momentum,
    norm_layer,
    resnet18,
    resnet50,
)
from accumexp.report.groups import Group
from accumexp.report.jobs import Job
from accumexp.report.trajectory import declared_differences
from accumexp.training.experiment import Experiment
from accumexp.training.preflight import check_window_norms

from ..support.command import run_command
from ..support.experiments import composed, trainer_of, weights
from ..support.reference import gradients, larger_batch, relative_error

BATCH, STEPS, MICRO = 128, 4, 32
M = 0.1
CLASSES = 5


def normed(norm: str, ghost_size: int | None = None, steps: int = STEPS) -> nn.Sequential:
    """Two convolutions, each with `norm` for windows of `BATCH` samples, with statistics of some training."""
    torch.manual_seed(5)
    micro = -(-BATCH // steps)
    options: Any = {"ghost_size": ghost_size, "window_steps": steps, "micro_batch_size": micro}
    layer = norm_layer(norm, momentum=M, groups=2, **options)
    model = nn.Sequential(
        # Without biases, of which a norm leaves nothing: their gradients are 0 but for rounding.
        *(nn.Conv2d(2, 6, 3, bias=False), layer(6), nn.ReLU()),
        *(nn.Conv2d(6, 4, 3, bias=False), layer(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, CLASSES)),
    ).double()
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith(("1.", "4.")) and values.is_floating_point():
            values.data.uniform_(0.5, 1.5)
    return model


def images(samples: int) -> tuple[Tensor, Tensor]:
    """Samples that are unlike each other, the later ones brighter: groups differ in mean and variance."""
    generator = torch.Generator().manual_seed(samples)
    inputs = torch.randn(samples, 2, 8, 8, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.5, 2, samples, dtype=torch.float64)[:, None, None, None]
    return inputs * scale + scale, torch.randint(0, CLASSES, (samples,), generator=generator)


def floats(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in buffers.items() if value.is_floating_point()}


def counted(buffers: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(value) for name, value in buffers.items() if not value.is_floating_point()}


# One window against one large batch ------------------------------------------------------------------


@pytest.mark.parametrize("samples", [128, 101, 37, 3])
@pytest.mark.parametrize(
    ("norm", "ghost_size"), [("frozen", None), ("group", None), ("ghost", None), ("ghost", 16)], ids=str
)
def test_a_window_has_the_gradient_and_the_buffers_of_the_larger_batch(
    norm: str, ghost_size: int | None, samples: int
) -> None:
    model, (inputs, targets) = normed(norm, ghost_size), images(samples)
    steps = steps_for(samples, BATCH, STEPS)
    last = samples if samples < BATCH else 0
    differences = inequalities(model, BATCH, STEPS, last=last)
    if ghost_size and last not in (0, 3):  # halves of unlike micro-batches are no quarters of the batch
        assert {difference.kind for difference in differences} == {"GhostBatchNorm2d"}
        return
    assert not differences
    before = {name: value.clone() for name, value in model.named_buffers()}
    gradient, buffers = larger_batch(model, nn.functional.cross_entropy, inputs, targets)
    Window(model, nn.CrossEntropyLoss(), STEPS).backward(inputs, targets, steps=steps)
    after = dict(model.named_buffers())
    assert relative_error(gradients(model), gradient) <= 1e-12
    assert counted(after) == counted(buffers)
    if norm == "group":
        assert not after
        return
    assert relative_error(floats(after), floats(buffers)) <= 1e-12
    changes = relative_error(floats(after), floats(before))
    assert changes == 0 if norm == "frozen" else changes > 1e-3
    groups = len(split_sizes(samples, -(-samples // (ghost_size or MICRO))))
    assert set(counted(after).values()) == {0 if norm == "frozen" else groups}


def test_a_window_with_batch_norm_is_not_the_larger_batch() -> None:
    model, (inputs, targets) = normed("batch"), images(BATCH)
    assert len(inequalities(model, BATCH, STEPS)) == 2
    gradient, buffers = larger_batch(model, nn.functional.cross_entropy, inputs, targets)
    Window(model, nn.CrossEntropyLoss(), STEPS).backward(inputs, targets)
    assert relative_error(gradients(model), gradient) > 1e-3
    assert relative_error(floats(dict(model.named_buffers())), floats(buffers)) > 1e-3


# Running statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", "ghost"])
@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_old_statistics_keep_their_weight_per_update_whatever_the_window(norm: str, steps: int) -> None:
    """An update is affine in the old statistics; two starts end apart by the weight of what was."""
    model, (inputs, targets) = (
        normed(norm, ghost_size=16 if norm == "ghost" else None, steps=steps),
        images(128),
    )
    other = copy.deepcopy(model)
    shifted = [b for name, b in other.named_buffers() if "running" in name]
    for buffer in shifted:
        buffer += 64.0
    for each in (model, other):
        Window(each, nn.CrossEntropyLoss(), steps).backward(inputs, targets)
    for buffer, start in zip(shifted, (b for n, b in model.named_buffers() if "running" in n), strict=True):
        assert torch.allclose((buffer - start) / 64, torch.full_like(start, 1 - M), rtol=1e-12, atol=0)


def test_matched_momentum() -> None:
    assert matched_momentum(0.1, 1) == pytest.approx(0.1, rel=1e-15)
    assert matched_momentum(0.0, 7) == 0 and matched_momentum(1.0, 7) == 1
    for times in (2, 3, 8):
        assert (1 - matched_momentum(0.1, times)) ** times == pytest.approx(0.9, rel=1e-14)
    for momentum, times in [(1.5, 1), (-0.1, 1), (0.1, 0)]:
        with pytest.raises(ValueError, match=r"=(1.5|-0.1|0): "):
            matched_momentum(momentum, times)


# Each by itself --------------------------------------------------------------------------------------


def by_hand(inputs: Tensor, sizes: list[int], norm: GhostBatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
    """(output, running mean, running variance) of groups of `sizes`, from the definitions."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    mean, variance, parts = norm.running_mean.clone(), norm.running_var.clone(), []
    for part in inputs.split(sizes):
        rows = part.transpose(0, 1).flatten(1)
        own_mean, own_variance = rows.mean(1), rows.var(1, correction=0)
        shape = (1, -1, 1, 1)
        centred = (part - own_mean.view(shape)) / (own_variance + norm.eps).sqrt().view(shape)
        parts.append(centred * norm.weight.view(shape) + norm.bias.view(shape))
        mean += norm.momentum * (own_mean - mean)
        variance += norm.momentum * (rows.var(1) - variance)
    return torch.cat(parts), mean, variance


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("samples", "sizes"), [(32, [8] * 4), (29, [8, 7, 7, 7]), (9, [5, 4]), (7, [7])])
def test_ghost_statistics_are_those_of_its_groups(
    samples: int, sizes: list[int], layout: torch.memory_format
) -> None:
    norm = GhostBatchNorm2d(2, ghost_size=8, momentum=0.3).double()
    assert norm.statistics_groups(samples) == sizes
    for parameter in norm.parameters():
        nn.init.uniform_(parameter)
    inputs = images(samples)[0].to(memory_format=layout)
    expected, mean, variance = by_hand(inputs, sizes, norm)
    torch.testing.assert_close(norm(inputs), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-13, atol=1e-13)
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == len(sizes)


@pytest.mark.parametrize("training", [True, False])
def test_ghost_with_one_group_is_torchs_batch_norm(training: bool) -> None:
    ghost, torchs = GhostBatchNorm2d(2, ghost_size=32).double(), nn.BatchNorm2d(2).double()
    inputs, ends = images(32)[0], []
    for norm in (ghost, torchs):
        norm(inputs)  # so that evaluation has something to go by
        norm.train(training).zero_grad()
        out = norm(inputs)
        out.square().mean().backward()
        assert norm.weight.grad is not None
        ends.append([out, norm.weight.grad, *norm.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_evaluation_goes_by_the_running_statistics_and_leaves_them() -> None:
    for norm in ("batch", "frozen", "ghost"):
        model, (inputs, _) = normed(norm, ghost_size=16 if norm == "ghost" else None).eval(), images(64)
        before = weights_of(model)
        together, one_by_one = model(inputs), torch.cat([model(one) for one in inputs.split(1)])
        torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_frozen_norm_stays_so_and_trains_its_weight_and_bias() -> None:
    model, (inputs, targets) = normed("frozen").train(), images(16)
    frozen = [module for module in model.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert len(frozen) == 2 and not any(module.training for module in frozen) and model.training
    nn.functional.cross_entropy(model(inputs), targets).backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for m in frozen for p in (m.weight, m.bias))


@pytest.mark.parametrize("norm", NORMS)
def test_a_state_goes_into_a_new_model(norm: str) -> None:
    model, (inputs, targets) = normed(norm), images(64)
    Window(model, nn.CrossEntropyLoss(), 2).backward(inputs, targets)
    new = normed(norm)
    new.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
    new.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(inputs), new.eval()(inputs))


def test_a_norm_loads_what_torchs_batch_norm_has_learned() -> None:
    torchs = normed("batch")
    for norm in ("frozen", "ghost"):
        model = normed(norm)
        model.load_state_dict({name: value + 0.5 for name, value in torchs.state_dict().items()})
        model.load_state_dict(torchs.state_dict())
        assert torch.equal(model.eval()(images(8)[0]), torchs.eval()(images(8)[0]))


# What the certificate of exactness says --------------------------------------------------------------


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


# From the configuration ------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "setting", ["accum=fsdp", "trainer.compile=true", "trainer.graph=true", "replicas=2"]
)
def test_settings_that_statistics_of_the_window_exclude(setting: str) -> None:
    config = composed("model=resnet18", "model.norm=window", "device=cpu", "data.image_size=32", setting)
    with pytest.raises(UsageError) as refused:
        check_window_norms(Experiment.build(config))
    key = setting.partition("=")[0] if setting.startswith("replicas") else setting
    assert str(refused.value).startswith(f"{key}: the model has BatchNorm over the window")
