"""Law 11 on the window alone: a denominator for each term, coupled losses on all outputs of the window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F

from accumexp.accum import LossScale, Recovery, Term, Window

from ..support.losses import ScaledCrossEntropy
from ..support.reference import gradients, relative_error

SAMPLES = 101
STEPS = [1, 2, 3, 8]


def model_and_batch() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    inputs = torch.randn(SAMPLES, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 5, (SAMPLES,), generator=generator).sort().values
    return model, inputs, targets


def means(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """A plain function of two means over samples."""
    return {"cross_entropy": F.cross_entropy(outputs, targets), "size": 0.1 * outputs.square().mean()}


class Masked:
    """Three terms: a count of the targets, a count of the outputs, and a weight that has a gradient."""

    def weights(self, targets: Tensor) -> dict[str, Tensor]:
        return {"masked": (targets > 1).sum()}

    def terms(self, outputs: Tensor, targets: Tensor) -> dict[str, Term]:
        losses = F.cross_entropy(outputs, targets, reduction="none")
        routed, soft = outputs.argmax(1) == 0, outputs.softmax(1)[:, 0]
        return {
            "masked": Term((losses * (targets > 1)).sum(), (targets > 1).sum()),
            "routed": Term((outputs.square().sum(1) * routed).sum(), routed.sum(), 0.3),
            "soft": Term((soft * losses).sum(), soft.sum(), 2.0),
        }


def routed(outputs: Tensor, targets: Tensor) -> dict[str, Term]:
    """One term alone, whose weight depends on the outputs."""
    chosen = outputs.argmax(1) < 3
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return {"routed": Term((losses * chosen).sum(), chosen.sum(), -0.5)}


def some(outputs: Tensor, targets: Tensor) -> dict[str, Tensor | Term]:
    """Terms that a batch has only where it has items of theirs: the targets are sorted."""
    losses = F.cross_entropy(outputs, targets, reduction="none")
    terms: dict[str, Tensor | Term] = {"size": outputs.square().mean()}
    for name, items in (("low", targets < 2), ("high", targets > 3)):
        if items.any():
            terms[name] = Term((losses * items).sum(), items.sum(), 0.7)
    return terms


class NextSample:
    """InfoNCE of every sample with the next one in the batch as its positive."""

    couples = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        normed = F.normalize(outputs, dim=1)
        similarities = normed @ normed.T / 0.3 - 1e6 * torch.eye(len(normed), dtype=normed.dtype)
        return F.cross_entropy(similarities, torch.arange(1, len(normed) + 1) % len(normed))


def balance(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Cross entropy and the balance loss of a mixture of experts, a product of two means over the batch."""
    probabilities = outputs.softmax(1)
    share = F.one_hot(outputs.argmax(1), 5).to(outputs.dtype).mean(0)
    return {
        "cross_entropy": F.cross_entropy(outputs, targets),
        "balance": 5 * (share * probabilities.mean(0)).sum(),
    }


balance.couples = True  # type: ignore[attr-defined]


def value_of(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of one batch, written out."""
    value = loss.terms(outputs, targets) if hasattr(loss, "terms") else loss(outputs, targets)
    if isinstance(value, Tensor):
        return value
    return torch.stack([number(term) for term in value.values()]).sum()


def number(term: Tensor | Term) -> Tensor:
    return term if isinstance(term, Tensor) else term.coefficient * term.total / term.weight


def larger_batch(model: nn.Module, loss: Any, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The gradient of the whole batch's loss by torch.func."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    return grad(lambda each: value_of(loss, functional_call(model, each, (inputs,)), targets))(parameters)


LOSSES: dict[str, Any] = {"means": means, "masked": Masked(), "next sample": NextSample(), "balance": balance}
LOSSES |= {"routed": routed, "some": some}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("name", "late_weights"),
    [*((name, "first_pass") for name in LOSSES), *((n, "gradients") for n in ("masked", "routed", "some"))],
)
def test_law_11_the_gradient_is_that_of_the_whole_batch(name: str, late_weights: Any, steps: int) -> None:
    model, inputs, targets = model_and_batch()
    window = Window(model, LOSSES[name], steps, late_weights=late_weights)
    expected = larger_batch(model, LOSSES[name], inputs, targets)
    value = pytest.approx(value_of(LOSSES[name], model(inputs), targets).item(), rel=1e-13)
    for _ in range(2):  # the second window knows the loss
        model.zero_grad()
        result = window.backward(inputs, targets)
        assert relative_error(gradients(model), expected) <= 1e-12
        assert float(result.loss) == value
        assert (name == "next sample") == (not result.terms)
        if result.terms:
            assert float(torch.stack(list(result.terms.values())).sum()) == value


@pytest.mark.parametrize("name", LOSSES)
def test_law_11_with_a_loss_scale_fp32_buffers_and_recovery(name: str) -> None:
    model, inputs, targets = model_and_batch()
    expected = larger_batch(model, LOSSES[name], inputs, targets)
    scale = LossScale(1024.0)
    window = Window(model, LOSSES[name], 3, loss_scale=scale, fp32_buffers=True)
    Recovery(window).backward(inputs, targets)
    scaled = {key: gradient / 1024 for key, gradient in gradients(model).items()}
    assert relative_error(scaled, expected) <= 1e-12


@pytest.mark.parametrize("name", ["masked", "next sample"])
def test_the_second_pass_has_the_draws_and_buffers_of_one(name: str) -> None:
    """A pass without gradients leaves no trace: dropout and running statistics are those of plain windows."""
    _, inputs, targets = model_and_batch()
    states = []
    for loss in (LOSSES[name], nn.CrossEntropyLoss()):
        torch.manual_seed(0)
        layers = nn.Linear(7, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 5)
        model = nn.Sequential(*layers).double()
        seen: list[Tensor] = []
        window = Window(model, loss, 3)
        for _ in range(2):
            window.backward(inputs, targets, observe=lambda outputs, targets, seen=seen: seen.append(outputs))
        buffers = [buffer.clone() for buffer in model.buffers()]
        states.append([*seen, *buffers, torch.rand(1)])
    assert len(states[0]) == 10
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_draws_that_cannot_be_repeated_are_refused() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs * torch.rand(inputs.shape, generator=self.generator, dtype=inputs.dtype)

    model, inputs, targets = model_and_batch()
    window = Window(nn.Sequential(Noise(), model), NextSample(), 2)
    with pytest.raises(RuntimeError, match="micro-batch 0: its second forward pass gave other outputs"):
        window.backward(inputs, targets)


def test_a_function_that_turns_out_to_return_terms_draws_once() -> None:
    model, inputs, targets = model_and_batch()
    model = nn.Sequential(nn.Dropout(0.5), model)
    outputs_of: list[Tensor] = []
    for loss in (means, lambda outputs, targets: sum(means(outputs, targets).values())):
        torch.manual_seed(1)
        Window(model, loss, 2).backward(
            inputs, targets, observe=lambda outputs, _: outputs_of.append(outputs)
        )
    assert len(outputs_of) == 4
    assert all(torch.equal(outputs_of[k], outputs_of[2 + k]) for k in range(2))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda outputs, targets: {}, "an empty mapping"),
        (lambda outputs, targets: {"a": 1.0}, "term 'a' is a float"),
        (lambda outputs, targets: {"a": Term(outputs.sum(1), 1.0)}, "term 'a' has a total of shape"),
        (lambda outputs, targets: {"a": Term(outputs.sum(), targets > 1)}, "term 'a' has a weight of shape"),
        (lambda outputs, targets: {"a": Term(outputs.sum(), 1.0, outputs.mean())}, "with a gradient"),
        (
            lambda outputs, targets: {"a": Term(outputs.sum(), 1.0, float(targets[-1]))},
            "coefficients 2 and 4",
        ),
        (
            lambda outputs, targets: (
                {"b": outputs.mean()} | means(outputs, targets) if targets[0] else means(outputs, targets)
            ),
            "term 'b' is a mean over samples that some",
        ),
        (lambda outputs, targets: (outputs.mean(), targets), "the loss returned a tuple"),
        (lambda outputs, targets: None, "the loss returned a NoneType"),
    ],
)
def test_a_wrong_term_is_named(loss: Callable[..., Any], message: str) -> None:
    model, inputs, targets = model_and_batch()
    with pytest.raises(ValueError, match=message):
        Window(model, loss, 2).backward(inputs, targets)


def test_a_sum_of_micro_batch_means_has_one_term() -> None:
    model, inputs, targets = model_and_batch()
    with pytest.raises(ValueError, match="reduction='sum' adds micro-batch means"):
        Window(model, Masked(), 2, reduction="sum")
    with pytest.raises(ValueError, match="reduction='sum' adds micro-batch means"):
        Window(model, means, 2, reduction="sum").backward(inputs, targets)


def test_outputs_without_samples_cannot_be_coupled() -> None:
    class Summed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            outputs = self.inner(inputs)
            return outputs, outputs.square().mean()

    class Loss(NextSample):
        def __call__(self, outputs: Any, targets: Tensor) -> Tensor:
            return super().__call__(outputs[0], targets) + outputs[1]

    model, inputs, targets = model_and_batch()
    with pytest.raises(ValueError, match="no dimension of samples"):
        Window(Summed(model), Loss(), 2).backward(inputs, targets)


def test_one_gradient_for_each_late_term_needs_no_first_pass() -> None:
    model, inputs, targets = model_and_batch()
    passes: list[bool] = []
    model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    expected = larger_batch(model, Masked(), inputs, targets)
    passes.clear()
    window = Window(model, Masked(), 4, late_weights="gradients", loss_scale=LossScale(1024.0))
    Recovery(window).backward(inputs, targets)
    assert passes == [True] * 4
    scaled = {key: gradient / 1024 for key, gradient in gradients(model).items()}
    assert relative_error(scaled, expected) <= 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"late_weights": "last"}, "'first_pass' or 'gradients', not 'last'"),
        ({"late_weights": "gradients", "fp32_buffers": True}, "not with fp32 buffers"),
    ],
)
def test_a_wrong_choice_for_late_weights_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Window(model_and_batch()[0], Masked(), 2, **options)


class Counted:
    """A loss that counts `weights` for its term "a", which weighs the samples."""

    def __init__(self, weights: dict[str, Any]) -> None:
        self.counted = weights

    def weights(self, targets: Tensor) -> dict[str, Any]:
        return self.counted

    def terms(self, outputs: Tensor, targets: Tensor) -> dict[str, Term]:
        return {"a": Term(outputs.square().sum(), len(targets))}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 300}, "term 'a': weights.targets. counts 300 in the window, and .* weigh 101"),
        ({"b": 7}, "term 'b': weights.targets. counts 7 in the window, and .* weigh 0"),
        ({"a": torch.ones(3)}, "term 'a' has a weight of shape"),
    ],
)
def test_weights_that_the_terms_do_not_have_are_refused(weights: dict[str, Any], message: str) -> None:
    model, inputs, targets = model_and_batch()
    with pytest.raises(ValueError, match=message):
        Window(model, Counted(weights), 2).backward(inputs, targets)


def test_an_integer_is_a_mean_as_well() -> None:
    model, inputs, targets = model_and_batch()

    def loss(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return means(outputs, targets) | {"count": torch.tensor(2)}

    result = Window(model, loss, 3).backward(inputs, targets)
    assert float(result.terms["count"]) == pytest.approx(2, rel=1e-6)


def test_bools_add_up_to_their_number() -> None:
    class Loss(Counted):
        def weights(self, targets: Tensor) -> dict[str, Tensor]:
            return {"a": (targets >= 0).any()}

        def terms(self, outputs: Tensor, targets: Tensor) -> dict[str, Term]:
            return {"a": Term(outputs.square().sum(), (targets >= 0).any())}

    model, inputs, targets = model_and_batch()
    parts = list(zip(inputs.split(40), targets.split(40), strict=True))
    result = Window(model, Loss({}), 3).backward(parts)
    expected = float(model(inputs).square().sum().detach()) / 3
    assert float(result.loss) == pytest.approx(expected, rel=1e-12)


def test_totals_below_fp32_are_divided_in_fp32() -> None:
    """A window's 1 / weight has no exact bf16 number, and is not rounded to one."""
    model, inputs, targets = model_and_batch()
    model, inputs = model.bfloat16(), inputs.bfloat16()
    by_loss = []
    for loss in (
        lambda o, t: {"a": Term(o.sum(), len(o))},
        lambda o, t: {"a": Term(o.float().sum(), len(o))},
    ):
        model.zero_grad()
        Window(model, loss, 1).backward(inputs, targets)
        by_loss.append(gradients(model))
    assert all(torch.equal(each, by_loss[1][name]) for name, each in by_loss[0].items())


class TooLarge:
    """A hook that has no memory for more than `most` samples."""

    def __init__(self, most: int) -> None:
        self.most = most

    def __call__(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        if len(inputs[0]) > self.most:
            raise torch.OutOfMemoryError("out of memory")


@pytest.mark.parametrize("name", LOSSES)
def test_a_first_window_that_does_not_fit_is_repeated(name: str) -> None:
    model, inputs, targets = model_and_batch()
    expected = larger_batch(model, LOSSES[name], inputs, targets)
    model.register_forward_pre_hook(TooLarge(20))
    result = Recovery(Window(model, LOSSES[name], 2)).backward(inputs, targets)
    assert result.steps == 8
    assert relative_error(gradients(model), expected) <= 1e-12


def test_parameters_of_a_loss_are_refused_where_their_gradient_would_be_wrong() -> None:
    model, inputs, targets = model_and_batch()
    loss = ScaledCrossEntropy().double()
    Window(model, loss, 3).backward(inputs, targets)
    assert loss.temperature.grad is not None
    accumulated = gradients(loss)
    loss.zero_grad()
    loss(model(inputs), targets).backward()
    assert relative_error(accumulated, gradients(loss)) <= 1e-12
    with pytest.raises(ValueError, match="temperature: gradients of a loss's parameters are not divided"):
        Window(model, loss, 3, loss_scale=LossScale())
    with pytest.raises(ValueError, match="whose gradients are not restored"):
        Recovery(Window(model, loss, 3))
    loss.requires_grad_(False)
    Recovery(Window(model, loss, 3, loss_scale=LossScale()))
