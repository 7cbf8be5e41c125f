"""Laws 1, 2 and 7 on the window alone, against one large batch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from accumexp.accum import Recovery, Window, WindowLoss, measure_activations, window_loss
from accumexp.models import LeNet5

from ..support.reference import classification, gradients, larger_batch_gradient, relative_error, small_model

CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0], dtype=torch.float64)


@given(samples=st.integers(1, 40), data=st.data())
def test_law_1_any_split_gives_the_larger_batchs_gradient(samples: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, samples))
    model, (inputs, targets) = small_model(), classification(samples)
    criterion = nn.CrossEntropyLoss()
    result = Window(model, criterion, steps).backward(inputs, targets)
    expected = larger_batch_gradient(model, criterion, inputs, targets)
    assert relative_error(gradients(model), expected) <= 1e-12
    assert float(result.loss) == pytest.approx(criterion(model(inputs), targets).item(), rel=1e-13)
    assert (result.samples, result.steps) == (samples, steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 64])
def test_law_1_in_fp32_within_the_bound_of_adding_steps_terms(steps: int) -> None:
    """Adding N fp32 terms errs by (N - 1) u sum |term| at most, elementwise (Higham, 2002, eq. 4.4)."""
    model, (inputs, targets) = small_model().float(), classification(64)
    inputs, criterion = inputs.float(), nn.CrossEntropyLoss(reduction="sum")
    terms: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for x, y in zip(inputs.tensor_split(steps), targets.tensor_split(steps), strict=True):
        model.zero_grad()
        (criterion(model(x), y) / 64).backward()
        for name, gradient in gradients(model).items():
            terms[name].append(gradient.double())
    model.zero_grad()
    Window(model, nn.CrossEntropyLoss(), steps).backward(inputs, targets)
    unit = torch.finfo(torch.float32).eps / 2
    for name, gradient in gradients(model).items():
        exact = torch.stack(terms[name]).sum(0)
        bound = (steps - 1) * unit / (1 - steps * unit) * torch.stack(terms[name]).abs().sum(0)
        assert ((gradient.double() - exact).abs() <= bound).all(), name


CRITERIA: dict[str, Callable[[], Callable[[Any, Any], Tensor]]] = {
    "cross_entropy": nn.CrossEntropyLoss,
    "class_weights": lambda: nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
    "ignore_index": lambda: nn.CrossEntropyLoss(ignore_index=2),
    "weights_and_ignore": lambda: nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=1),
    "smoothing": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "smoothing_weights_ignore": lambda: nn.CrossEntropyLoss(
        CLASS_WEIGHTS, ignore_index=0, label_smoothing=0.2
    ),
    "nll": lambda: lambda outputs, targets: nn.NLLLoss()(outputs.log_softmax(1), targets),
    "multi_margin": lambda: nn.MultiMarginLoss(weight=CLASS_WEIGHTS),
    "summed": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "function": lambda: lambda outputs, targets: nn.functional.cross_entropy(outputs, targets),
}


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("steps", [2, 5, 23])
def test_law_2_the_denominator_is_the_windows_own_weight(name: str, steps: int) -> None:
    model, (inputs, targets) = small_model(), classification(23)
    targets = targets.sort().values  # classes, and with them weights, are unlike in the micro-batches
    criterion = CRITERIA[name]()
    Window(model, criterion, steps).backward(inputs, targets)
    expected = larger_batch_gradient(model, criterion, inputs, targets)
    assert relative_error(gradients(model), expected) <= 1e-12


ELEMENTWISE = [nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCEWithLogitsLoss]


@pytest.mark.parametrize("kind", ELEMENTWISE)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_law_2_for_elementwise_criteria(kind: Callable[..., Any], reduction: str) -> None:
    model, (inputs, _) = small_model(), classification(17)
    targets = torch.rand(17, 5, dtype=torch.float64)
    criterion = kind(reduction=reduction)
    Window(model, criterion, 4).backward(inputs, targets)
    assert relative_error(gradients(model), larger_batch_gradient(model, criterion, inputs, targets)) <= 1e-12


def test_law_2_for_a_criterion_that_divides_by_samples() -> None:
    model, (inputs, _) = small_model(), classification(17)
    targets, criterion = torch.rand(17, 5, dtype=torch.float64), nn.KLDivLoss(reduction="batchmean")
    Window(model, criterion, 4).backward(inputs, targets)
    assert relative_error(gradients(model), larger_batch_gradient(model, criterion, inputs, targets)) <= 1e-12


def test_law_2_a_criterion_that_returns_one_loss_a_sample_is_averaged() -> None:
    model, (inputs, targets) = small_model(), classification(17)
    Window(model, nn.MultiMarginLoss(reduction="none"), 4).backward(inputs, targets)
    expected = larger_batch_gradient(model, nn.MultiMarginLoss(), inputs, targets)
    assert relative_error(gradients(model), expected) <= 1e-12


def test_law_2_probabilities_as_targets() -> None:
    model, (inputs, _) = small_model(), classification(17)
    targets = torch.rand(17, 5, dtype=torch.float64).softmax(1)
    criterion = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
    Window(model, criterion, 5).backward(inputs, targets)
    assert relative_error(gradients(model), larger_batch_gradient(model, criterion, inputs, targets)) <= 1e-12


def test_law_2_valid_tokens_of_ragged_sequences() -> None:
    """The case that trainers got wrong in 2024: padded sequences, a mean over valid tokens."""
    torch.manual_seed(0)
    model = nn.Linear(4, 7).double()
    inputs = torch.randn(12, 10, 4, dtype=torch.float64)
    targets = torch.randint(0, 7, (12, 10))
    for sample, length in enumerate([10, 1, 7, 2, 2, 9, 1, 1, 1, 3, 8, 1]):
        targets[sample, length:] = -100

    def token_mean(outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten())

    class TokenLoss:
        def weight(self, labels: Any) -> Tensor:
            return (labels != -100).sum()

        def total(self, outputs: Any, labels: Any) -> Tensor:
            return nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="sum")

    expected = larger_batch_gradient(model, token_mean, inputs, targets)
    Window(model, TokenLoss(), 5).backward(inputs, targets)
    assert relative_error(gradients(model), expected) <= 1e-12
    model.zero_grad()
    Window(model, token_mean, 5, reduction="mean").backward(inputs, targets)
    assert relative_error(gradients(model), expected) > 0.05, "the data must tell a mean of means apart"


def test_law_2_the_weight_is_counted_once_before_the_first_backward() -> None:
    events: list[str] = []

    class Spy:
        def weight(self, targets: Any) -> float:
            events.append(f"weight of {len(targets)}")
            return float(len(targets))

        def total(self, outputs: Any, targets: Any) -> Tensor:
            events.append(f"total of {len(targets)}")
            return outputs.sum()

    model, (inputs, targets) = small_model(), classification(10)
    assert isinstance(Spy(), WindowLoss)
    Window(model, Spy(), 4).backward(inputs, targets)
    assert events == ["weight of 10", "total of 3", "total of 3", "total of 2", "total of 2"]


def test_reduction_sum_is_the_sum_of_micro_batch_means() -> None:
    model, (inputs, targets) = small_model(), classification(22)
    criterion = nn.CrossEntropyLoss(weight=CLASS_WEIGHTS)
    result = Window(model, criterion, 4, reduction="sum").backward(inputs, targets)
    parts = zip(inputs.split([6, 6, 5, 5]), targets.split([6, 6, 5, 5]), strict=True)
    means = [larger_batch_gradient(model, criterion, x, y) for x, y in parts]
    expected = {name: torch.stack([mean[name] for mean in means]).sum(0) for name in means[0]}
    assert relative_error(gradients(model), expected) <= 1e-12
    assert float(result.loss) == pytest.approx(criterion(model(inputs), targets).item(), rel=1e-12)


def test_a_window_of_ignored_targets_has_no_gradient() -> None:
    model, (inputs, targets) = small_model(), classification(8)
    for reduction in ("mean", "sum"):
        result = Window(model, nn.CrossEntropyLoss(ignore_index=0), 3, reduction=reduction).backward(
            inputs, torch.zeros_like(targets)
        )
        assert all(not gradient.any() for gradient in gradients(model).values())
        assert float(result.loss) == 0 and float(result.weight) == 0


def test_gradients_are_added_to_what_is_there() -> None:
    model, (inputs, targets) = small_model(), classification(12)
    window = Window(model, nn.CrossEntropyLoss(), 3)
    window.backward(inputs, targets)
    once = {name: gradient.clone() for name, gradient in gradients(model).items()}
    window.backward(inputs, targets)
    assert relative_error(gradients(model), {name: 2 * gradient for name, gradient in once.items()}) <= 1e-12


def test_models_of_several_inputs_and_named_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5).double()

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.layer(first) * second

    model, (inputs, targets) = Two(), classification(11)
    scale = torch.rand(11, 1, dtype=torch.float64)
    expected = torch.autograd.grad(
        nn.functional.cross_entropy(model(inputs, scale), targets), list(model.parameters())
    )
    for batch in ((inputs, scale), [inputs, scale], {"second": scale, "first": inputs}):
        model.zero_grad()
        Window(model, nn.CrossEntropyLoss(), 4).backward(batch, targets)
        for gradient, right in zip(gradients(model).values(), expected, strict=True):
            torch.testing.assert_close(gradient, right, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("steps", [0, -1, 9])
def test_a_batch_that_cannot_be_split_is_refused(steps: int) -> None:
    model, (inputs, targets) = small_model(), classification(8)
    with pytest.raises(ValueError, match=r"micro-batches"):
        Window(model, nn.CrossEntropyLoss(), max(steps, 1)).backward(inputs, targets, steps=steps)
    if steps < 1:
        with pytest.raises(ValueError, match="at least 1"):
            Window(model, nn.CrossEntropyLoss(), steps)


def test_tensors_that_disagree_in_size_are_refused() -> None:
    model, (inputs, targets) = small_model(), classification(8)
    with pytest.raises(ValueError, match=r"share their first dimension.*\[6, 8\]"):
        Window(model, nn.CrossEntropyLoss(), 2).backward(inputs, targets[:6])
    with pytest.raises(ValueError, match="reduction"):
        Window(model, nn.CrossEntropyLoss(), 2, reduction="average")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_law_7_saved_activations_fall_with_the_micro_batch(steps: int) -> None:
    model = LeNet5()
    images, labels = torch.randn(64, 1, 32, 32), torch.randint(0, 10, (64,))
    peaks = []
    for split in (1, steps):
        with measure_activations(model, [images, labels]) as saved:
            Window(model, nn.CrossEntropyLoss(), split).backward(images, labels)
        peaks.append(saved.peak_bytes)
    # Only the loss's few scalars do not shrink.
    assert peaks[0] / steps <= peaks[1] <= peaks[0] / steps + 1024


@pytest.mark.parametrize(
    ("dtype", "buffers", "held"),
    [
        (torch.float32, True, 2),
        (torch.bfloat16, False, 2),
        (torch.bfloat16, True, 2),
    ],
)
def test_law_7_no_gradient_sized_buffer_but_grad(dtype: torch.dtype, buffers: bool, held: int) -> None:
    """Between micro-batches a parameter has its `.grad`, or in its place one fp32 buffer if asked for."""
    model = nn.Linear(37, 41, bias=False).to(dtype)
    shapes: list[int] = []

    def count(outputs: Any, targets: Any) -> None:
        alive = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.shape == (41, 37)]
        alive += [model.weight.grad] if model.weight.grad is not None else []
        shapes.append(len({x.untyped_storage().data_ptr() for x in alive}))

    window = Window(model, nn.MSELoss(), 4, fp32_buffers=buffers)
    window.backward(torch.randn(8, 37, dtype=dtype), torch.randn(8, 41), observe=count)
    assert shapes == [held] * 4
    assert model.weight.grad is not None and model.weight.grad.dtype is dtype


@pytest.mark.parametrize("steps", [8, 64, 256])
def test_fp32_buffers_round_once_at_any_number_of_steps(steps: int) -> None:
    torch.manual_seed(1)
    model = nn.Linear(3, 2).bfloat16()
    inputs = torch.randn(steps, 3).bfloat16() + 2
    targets = torch.randn(steps, 2)
    errors = {}
    for buffers in (False, True):
        terms: dict[str, list[Tensor]] = {"weight": [], "bias": []}
        for x, y in zip(inputs.split(1), targets.split(1), strict=True):
            model.zero_grad()
            (nn.functional.mse_loss(model(x).float(), y) / steps).backward()
            for name, gradient in gradients(model).items():
                terms[name].append(gradient.double())
        model.zero_grad()
        Window(model, nn.MSELoss(), steps, fp32_buffers=buffers).backward(inputs, targets)
        exact = {name: torch.stack(values).sum(0) for name, values in terms.items()}
        actual = {name: gradient.double() for name, gradient in gradients(model).items()}
        errors[buffers] = relative_error(actual, exact)
    half_unit = torch.finfo(torch.bfloat16).eps / 2
    assert errors[True] <= half_unit * 1.01  # one rounding to bf16; the fp32 sum's own error is 2**-16 of it
    assert errors[False] > errors[True]


def test_autocast_keeps_fp32_gradients_close_to_fp32s() -> None:
    model, (inputs, targets) = small_model().float(), classification(32)
    expected = larger_batch_gradient(model, nn.CrossEntropyLoss(), inputs.float(), targets)
    Window(model, nn.CrossEntropyLoss(), 4, autocast=torch.bfloat16).backward(inputs.float(), targets)
    actual = gradients(model)
    assert all(gradient.dtype is torch.float32 for gradient in actual.values())
    assert 1e-6 < relative_error(actual, expected) < 0.05


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("steps", [1, 3, 23])
def test_law_2_a_window_of_known_weight_has_the_bits_of_one_that_counts(
    steps: int, reduction: Literal["mean", "sum"]
) -> None:
    runs = []
    inputs, targets = classification(23)
    for weight in (None, 23.0):
        model = small_model()
        window = Window(model, nn.CrossEntropyLoss(), steps, reduction=reduction)
        result = window.backward(inputs, targets, weight=weight)
        runs.append([*gradients(model).values(), result.loss, torch.as_tensor(result.weight).double()])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_a_loss_of_its_own_is_used_as_it_is() -> None:
    loss = window_loss(nn.CrossEntropyLoss())
    assert window_loss(loss) is loss


def test_a_list_of_micro_batches_is_refused_where_it_cannot_be_split_again() -> None:
    window = Window(small_model(), nn.CrossEntropyLoss(), 2)
    with pytest.raises(ValueError, match="a list of micro-batches is split already"):
        Recovery(window).backward([classification(2), classification(2)])
