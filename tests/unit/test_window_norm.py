"""BatchNorm over the window is torch's on the whole batch: gradients, running statistics, draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from accumexp.accum import (
    GraphedWindow,
    LossScale,
    OutOfMemory,
    Recovery,
    Window,
    WindowBatchNorm2d,
    inequalities,
    window_batch_norm,
)
from accumexp.accum.replica_window import ReplicaWindow
from accumexp.proof import certify

from ..support.reference import gradients, larger_batch, relative_error
from .test_terms import LOSSES, value_of

KINDS = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}
TOO_LARGE = 4  # samples


class Net(nn.Module):
    """A stem, a residual block whose shortcut has a norm, and a BatchNorm1d of features."""

    def __init__(self, dimensions: int = 2, **options: Any) -> None:
        super().__init__()
        convolution, norm = KINDS[dimensions]
        self.stem = nn.Sequential(convolution(3, 6, 3, bias=False), norm(6, **options), nn.ReLU())
        self.block = nn.Sequential(convolution(6, 4, 2), norm(4, **options), nn.Tanh())
        self.shortcut = nn.Sequential(convolution(6, 4, 2), norm(4, **options))
        self.features = nn.BatchNorm1d(4, **options)
        self.head = nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        stem = self.stem(inputs)
        joined = self.block(stem) + self.shortcut(stem)
        return self.head(self.features(joined.flatten(2).mean(2)))


def net_and_batch(samples: int = 13, dimensions: int = 2, **options: Any) -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Net(dimensions, **options).double()
    inputs = torch.randn(samples, 3, *[5] * dimensions, dtype=torch.float64) + 0.5
    return model, inputs, torch.randint(0, 5, (samples,)).sort().values


def error_of(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of a parameter, relative to the whole gradient: that of a bias before a norm is 0."""
    assert actual.keys() == expected.keys()
    norm = torch.stack([each.norm() for each in expected.values()]).norm()
    return max(((actual[name] - expected[name]).norm() / norm).item() for name in expected)


def assert_larger_batch(model: nn.Module, loss: Any, inputs: Tensor, targets: Tensor, run: Any) -> None:
    """Compares gradients and buffers after `run` with those of a plain batch of the same model before."""
    gradient, buffers = larger_batch(model, lambda *pair: value_of(loss, *pair), inputs, targets)
    run(window_batch_norm(model))
    assert error_of(gradients(model), gradient) <= 1e-12
    left = dict(model.named_buffers())
    counts = [name for name in buffers if name.endswith("num_batches_tracked")]
    assert all(torch.equal(left.pop(name), buffers.pop(name)) for name in counts)
    if buffers:
        assert relative_error(left, buffers) <= 1e-12


@pytest.mark.parametrize("dimensions", KINDS)
@pytest.mark.parametrize(("samples", "steps"), [(12, 1), (12, 2), (13, 3), (8, 8), (2, 2)])
def test_a_window_is_the_larger_batch(dimensions: int, samples: int, steps: int) -> None:
    model, inputs, targets = net_and_batch(samples, dimensions)
    window = Window(model, nn.CrossEntropyLoss(), steps)
    assert_larger_batch(
        model, F.cross_entropy, inputs, targets, lambda _: window.backward(inputs, targets, steps=steps)
    )


@pytest.mark.parametrize(
    "options", [{"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_options_of_torchs_batch_norm(options: dict[str, Any]) -> None:
    model, inputs, targets = net_and_batch(**options)
    window = Window(model, nn.CrossEntropyLoss(), 3)
    assert_larger_batch(model, F.cross_entropy, inputs, targets, lambda _: window.backward(inputs, targets))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_several_terms_and_coupled_ones(name: str) -> None:
    model, inputs, targets = net_and_batch(29)
    window = Window(model, LOSSES[name], 3)
    assert_larger_batch(model, LOSSES[name], inputs, targets, lambda _: window.backward(inputs, targets))


def test_micro_batches_of_a_list_and_of_several_sizes() -> None:
    model, inputs, targets = net_and_batch()
    parts = list(zip(inputs.split([1, 7, 5]), targets.split([1, 7, 5]), strict=True))
    window = Window(model, nn.CrossEntropyLoss(), 3)
    assert_larger_batch(model, F.cross_entropy, inputs, targets, lambda _: window.backward(parts))


def test_a_loss_scale_and_fp32_buffers() -> None:
    model, inputs, targets = net_and_batch()
    window = Window(model, nn.CrossEntropyLoss(), 3, loss_scale=LossScale(1024.0), fp32_buffers=True)

    def run(_: nn.Module) -> None:
        window.backward(inputs, targets)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad /= 1024

    assert_larger_batch(model, F.cross_entropy, inputs, targets, run)


def test_a_norm_that_is_called_twice_frozen_parameters_and_one_in_eval_mode() -> None:
    class Twice(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.stem[1](super().forward(inputs)[:, :3, None, None].repeat(1, 2, 1, 1)).mean((2, 3))

    torch.manual_seed(0)
    model, (_, inputs, targets) = Twice().double(), net_and_batch()
    model.block.requires_grad_(False)
    model.shortcut[1].eval()
    window = Window(model, nn.CrossEntropyLoss(), 3)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradient, buffers = larger_batch(model, F.cross_entropy, inputs, targets)
    window_batch_norm(model)
    window.backward(inputs, targets)
    assert error_of(gradients(model), {name: gradient[name] for name in trained}) <= 1e-12
    left = dict(model.named_buffers())
    assert left["stem.1.num_batches_tracked"] == buffers["stem.1.num_batches_tracked"] == 2
    for name in ("stem.1.running_mean", "stem.1.running_var", "shortcut.1.running_mean"):
        torch.testing.assert_close(left[name], buffers[name], rtol=1e-12, atol=1e-12)


def test_draws_are_those_of_one_pass() -> None:
    """Draws beside a norm are those of a plain window, whose micro-batches draw one after the other."""
    _, inputs, targets = net_and_batch()
    masks: list[Tensor] = []

    class Drawing(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            mask = torch.rand_like(inputs)
            masks.append(mask)
            return inputs * mask

    class Given(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * torch.cat(masks[-3:])

    model = nn.Sequential(
        net_and_batch()[0].stem, Drawing(), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(54, 5)
    )
    model = window_batch_norm(model.double())
    window = Window(model, nn.CrossEntropyLoss(), 3)
    torch.manual_seed(1)
    drawn = [torch.rand(len(part), 6, 3, 3, dtype=torch.float64) for part in inputs.tensor_split(3)]
    after = torch.get_rng_state()
    torch.manual_seed(1)
    window.backward(inputs, targets)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(map(torch.equal, masks[-3:], drawn))
    actual = gradients(model)
    model[1] = Given()  # pyright: ignore[reportIndexIssue]
    gradient, _ = larger_batch(model, F.cross_entropy, inputs, targets)
    assert error_of(actual, gradient) <= 1e-12


def test_a_checkpointed_part() -> None:
    class Checkpointed(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            stem = checkpoint(self.stem, inputs, use_reentrant=False)
            joined = checkpoint(self.block, stem, use_reentrant=False) + self.shortcut(stem)
            return self.head(self.features(joined.flatten(2).mean(2)))

    model, inputs, targets = net_and_batch()
    gradient, buffers = larger_batch(model, F.cross_entropy, inputs, targets)
    model.__class__ = Checkpointed
    Window(window_batch_norm(model), nn.CrossEntropyLoss(), 3).backward(inputs, targets)
    assert error_of(gradients(model), gradient) <= 1e-12
    left = model.get_buffer("block.1.running_var")
    torch.testing.assert_close(left, buffers["block.1.running_var"], rtol=1e-12, atol=0)


def test_out_of_memory_repeats_the_window() -> None:
    model, inputs, targets = net_and_batch()

    def limited(module: nn.Module, arguments: tuple[Tensor]) -> None:
        if len(arguments[0]) > TOO_LARGE:
            raise torch.OutOfMemoryError

    notified: list[OutOfMemory] = []

    def run(model: nn.Module) -> None:
        hook = model.features.register_forward_pre_hook(limited)  # type: ignore[union-attr, operator]
        Recovery(Window(model, nn.CrossEntropyLoss(), 2), notified.append).backward(inputs, targets)
        hook.remove()

    assert_larger_batch(model, F.cross_entropy, inputs, targets, run)
    assert [each.at_most for each in notified] == [4]


def test_outside_of_a_window_it_is_torchs_batch_norm() -> None:
    model, inputs, _ = net_and_batch()
    expected = model(inputs)
    changed = window_batch_norm(net_and_batch()[0])
    assert torch.equal(changed(inputs), expected)
    assert torch.equal(changed.eval()(inputs), model.eval()(inputs))
    assert all(map(torch.equal, changed.state_dict().values(), model.state_dict().values()))


def test_what_is_converted() -> None:
    class CustomBatchNorm2d(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(2), CustomBatchNorm2d(2), nn.SyncBatchNorm(2))
    weight = model[0].weight
    assert window_batch_norm(model) is model and model[0].weight is weight
    assert [type(module) for module in model] == [WindowBatchNorm2d, CustomBatchNorm2d, nn.SyncBatchNorm]
    with pytest.raises(ValueError, match="1: a lazy BatchNorm has no channels yet"):
        window_batch_norm(nn.Sequential(nn.ReLU(), nn.LazyBatchNorm2d()))


def test_law_10_no_inequality_is_named() -> None:
    model = net_and_batch()[0]
    assert len(inequalities(model, 12, 4)) == 4
    assert inequalities(window_batch_norm(model), 12, 4, ranks=2, last=5) == []


def test_what_cannot_be_exact_is_refused() -> None:
    model, inputs, targets = net_and_batch()
    window_batch_norm(model)
    with pytest.raises(ValueError, match="no one graph"):
        GraphedWindow(Window(model, nn.CrossEntropyLoss(), 2), lambda function: function)
    with pytest.raises(ValueError, match="not of several at once"):
        ReplicaWindow([Window(model, nn.CrossEntropyLoss(), 2)])
    model._compiled_call_impl = model.forward  # as `model.compile()` sets
    with pytest.raises(ValueError, match="a compiled one cannot"):
        Window(model, nn.CrossEntropyLoss(), 2)
    model._compiled_call_impl = None

    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = WindowBatchNorm2d(3), nn.Linear(75, 5)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head((inputs if inputs.sum() < 0 else self.norm(inputs)).flatten(1))

    skipping = Skipping().double()
    inputs[:6] = -inputs[:6].abs()
    with pytest.raises(
        ValueError, match="norm: a norm over the window has to be called in every micro-batch"
    ):
        Window(skipping, nn.CrossEntropyLoss(), 2).backward(inputs[:12], targets[:12])
    assert skipping.norm.window_pass is None and skipping.norm.num_batches_tracked == 0


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2, 3, 8])
def test_resnet18(steps: int) -> None:
    from accumexp.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=10, norm="window").double()
    inputs, targets = torch.randn(11, 3, 32, 32, dtype=torch.float64), torch.randint(0, 10, (11,))
    window = Window(model, nn.CrossEntropyLoss(), steps)
    assert_larger_batch(model, F.cross_entropy, inputs, targets, lambda _: window.backward(inputs, targets))


@pytest.mark.slow
@pytest.mark.parametrize("over_window", [True, False])
def test_the_proof_knows_it_from_statistics_of_a_micro_batch(over_window: bool) -> None:
    model, inputs, targets = net_and_batch(16)
    loss = nn.CrossEntropyLoss()

    def train_window(model: nn.Module, optimizer: Any, batch: Any, steps: int) -> Tensor:
        optimizer.zero_grad()
        result = Window(model, loss, steps).backward(*batch)
        optimizer.step()
        return result.loss

    model = window_batch_norm(model) if over_window else model
    certificate = certify(train_window, model.float(), loss, (inputs.float(), targets), 4)
    assert (certificate.verdict == "proved") == over_window


def test_a_reentrant_checkpoint_is_refused() -> None:
    """Its first forward has no graph, so that the sums of its norms are not found."""

    class Checkpointed(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            stem = checkpoint(self.stem, inputs.clone().requires_grad_(), use_reentrant=True)
            return self.head(self.features((self.block(stem) + self.shortcut(stem)).flatten(2).mean(2)))

    torch.manual_seed(0)
    model, (_, inputs, targets) = Checkpointed().double(), net_and_batch()
    window = Window(window_batch_norm(model), nn.CrossEntropyLoss(), 3)
    with pytest.raises(RuntimeError, match=r"stem\.1: .*give use_reentrant=False"):
        window.backward(inputs, targets)
