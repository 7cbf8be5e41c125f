"""The four norms: three of them give any split of a batch the whole batch's gradient and buffers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from accumexp.accum import Window, inequalities, split_sizes, steps_for
from accumexp.models import NORMS, FrozenBatchNorm2d, GhostBatchNorm2d, matched_momentum

from ..support.norms import BATCH, MICRO, STEPS, M, floats, images, normed
from ..support.reference import gradients, larger_batch, relative_error


def counted(buffers: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(value) for name, value in buffers.items() if not value.is_floating_point()}


# One window against one large batch --------------------------------------------------------------------


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


# Running statistics ------------------------------------------------------------------------------------


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


# Each by itself ----------------------------------------------------------------------------------------


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
