"""The shipped losses: their formulas, and windows of them against the whole batch."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accumexp.accum import LossScale, Recovery, Window, window_loss
from accumexp.accum.terms import CoupledLoss
from accumexp.losses import (
    Cox,
    FromOutput,
    InfoNCE,
    LoadBalance,
    Sum,
    SupervisedContrastive,
    cox,
    info_nce,
    load_balance,
    supervised_contrastive,
)

from ..support.losses import CASES, LAYERS, reference
from ..support.reference import gradients, relative_error


@pytest.mark.parametrize("name", [*CASES, "layers"])
def test_law_11_a_window_of_a_shipped_loss_is_the_whole_batch(name: str) -> None:
    case = CASES.get(name, LAYERS)
    expected, value = reference(case)
    inputs, targets = case.batch()
    for steps in (1, 2, 3, 8):
        model = case.model()
        window = Window(model, case.loss, steps)
        result = window.backward(inputs, targets)
        assert relative_error(gradients(model), expected) <= (1e-12 if case.passes == 1 else 1e-10)
        assert float(result.loss) == pytest.approx(value, rel=1e-12)
        assert window.passes == case.passes


@pytest.mark.parametrize("name", ["balance", "three terms", "of the model"])
def test_shipped_losses_under_a_scale_recovered_and_copied(name: str) -> None:
    case = CASES[name]
    expected, _ = reference(case)
    model = case.model()
    window = Window(model, copy.deepcopy(case.loss), 3, loss_scale=LossScale(1024.0))
    Recovery(window).backward(*case.batch())
    assert relative_error({key: value / 1024 for key, value in gradients(model).items()}, expected) <= 1e-10


def test_a_partial_of_a_function_that_couples_couples() -> None:
    assert isinstance(window_loss(functools.partial(info_nce, temperature=0.5)), CoupledLoss)
    assert not isinstance(window_loss(functools.partial(nn.functional.mse_loss)), CoupledLoss)


def test_settings_are_those_of_the_functions() -> None:
    outputs = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 0, 1, 1, 2, 2, 0])
    assert InfoNCE(0.5)(outputs) == info_nce(outputs, temperature=0.5) != info_nce(outputs)
    contrasted = SupervisedContrastive(0.5)(outputs, classes)
    assert contrasted == supervised_contrastive(outputs, classes, 0.5)
    both = supervised_contrastive(outputs.flatten(0, 1), classes.repeat_interleave(2), 0.5)
    assert torch.allclose(contrasted, both), "two views of a sample are two samples of its class"
    times, events = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0]), torch.tensor([1, 1, 1, 0, 1])
    hazards = outputs[:5, 0, 0]
    assert Cox("efron")(hazards, (times, events)) == cox(hazards, (times, events), "efron")
    assert torch.equal(cox(hazards, torch.stack([times, events.float()], 1)), cox(hazards, (times, events)))
    assert LoadBalance(2)(outputs) == load_balance(outputs, top_k=2)


def test_values_that_are_known() -> None:
    alike = torch.ones(4, 2, 3)
    assert float(info_nce(alike)) == pytest.approx(math.log(4))
    assert float(load_balance(torch.eye(5).repeat(3, 1) * 50)) == pytest.approx(1)
    assert float(load_balance(torch.tensor([[50.0, 0, 0, 0]]).repeat(9, 1))) == pytest.approx(4)
    # No ties: of three events each set at risk has 3, 2 and 1 samples of equal hazard.
    times, events = torch.tensor([3.0, 1.0, 2.0]), torch.ones(3)
    for ties in ("breslow", "efron"):
        assert float(cox(torch.zeros(3), (times, events), ties)) == pytest.approx(math.log(6) / 3)
    # All at once: 3^3 by Breslow, 3 * 2 * 1 by Efron.
    assert float(cox(torch.zeros(3), (torch.ones(3), events))) == pytest.approx(math.log(3))
    assert float(cox(torch.zeros(3), (torch.ones(3), events), "efron")) == pytest.approx(math.log(6) / 3)


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        (supervised_contrastive, torch.randn(1, 3), torch.zeros(1)),
        (supervised_contrastive, torch.randn(3, 3), torch.arange(3)),
        (cox, torch.randn(4, 1), (torch.arange(4), torch.zeros(4))),
        (Cox("efron"), torch.randn(4, 1), (torch.zeros(4), torch.zeros(4))),
    ],
)
def test_a_batch_in_which_nothing_counts_has_the_loss_and_the_gradient_0(
    loss: Any, outputs: Tensor, targets: Any
) -> None:
    outputs.requires_grad_(True)
    value = loss(outputs, targets)
    value.backward()
    assert value.item() == 0
    assert outputs.grad is not None and not outputs.grad.any()


def test_hazards_that_differ_widely_are_no_overflow() -> None:
    hazards = torch.tensor([600.0, -600.0, 0.0, 500.0], requires_grad=True)
    targets = torch.tensor([1, 1, 2, 2]), torch.tensor([1, 1, 1, 0])
    for ties in ("breslow", "efron"):
        value = cox(hazards, targets, ties)
        (gradient,) = torch.autograd.grad(value, hazards)
        assert value.isfinite() and gradient.isfinite().all()


def whole_batch(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, torch.autograd.grad(value, list(model.parameters())), strict=True))


class NextToken:
    """The mean over the labels that follow another and are not -100."""

    def weight(self, targets: Tensor) -> Tensor:
        return (targets[:, 1:] != -100).sum()

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        logits, following = outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten()
        return nn.functional.cross_entropy(logits, following, reduction="sum")


@pytest.mark.slow  # the import of transformers
def test_a_model_of_transformers_is_used_as_it_is() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    config = transformers.MixtralConfig(
        **(sizes | experts),
        vocab_size=11,
        max_position_embeddings=16,
        use_cache=False,
        output_router_logits=True,
        experts_implementation="eager",  # the others know no fp64
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).double()
    ids = torch.randint(0, 11, (10, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.where(torch.arange(7) < torch.arange(2, 12)[:, None], -100)
    tokens = {"loss": NextToken(), "output": "logits"}
    balance = {"loss": LoadBalance(top_k=2), "output": "router_logits", "coefficient": 0.02}
    whole = model(input_ids=ids, labels=labels)
    coefficient = config.router_aux_loss_coef
    expected = whole_batch(model, whole.loss + (0.02 - coefficient) * whole.aux_loss)
    result = Window(model, Sum({"tokens": tokens, "balance": balance}), 3).backward(
        {"input_ids": ids}, labels
    )
    assert relative_error(gradients(model), expected) <= 1e-6  # its norms and softmax are in fp32
    assert float(result.terms["balance"]) == pytest.approx(0.02 * whole.aux_loss.item())
    model.zero_grad()
    model.config.output_router_logits = False
    expected = whole_batch(model, model(input_ids=ids, labels=labels).loss)
    loss = FromOutput(over="labels", skipped=1)
    Window(model, loss, 3).backward({"input_ids": ids, "labels": labels}, labels)
    assert relative_error(gradients(model), expected) <= 1e-6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sum({}), "terms: at least one"),
        (lambda: Sum({"a": {"coefficient": 1}}), "terms.a: a mapping of loss"),
        (lambda: Sum({"a": {"loss": nn.MSELoss(), "weight": 2}}), "terms.a.weight: unknown"),
        (lambda: Sum({"a": {"loss": nn.MSELoss(reduction="sum")}}), "terms.a: a sum over samples"),
        (lambda: Cox("exact"), "ties=exact: one of breslow, efron"),
        (lambda: InfoNCE(0.0), "temperature=0.0: a number above 0"),
        (lambda: LoadBalance(0), "top_k=0"),
        (lambda: FromOutput(over="tokens"), "over=tokens: one of samples, labels"),
        (lambda: FromOutput("aux")({"loss": 1}), "no 'aux', it has loss"),
        (lambda: info_nce(torch.ones(3, 4)), r"not \(3, 4\)"),
        (
            lambda: Sum({"a": {"loss": lambda o, t: {"b": o.mean()}}}).terms(torch.ones(2), torch.ones(2)),
            "terms.a: returns several terms",
        ),
    ],
)
def test_what_is_no_loss_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "message"),
    [
        (supervised_contrastive, (6, 3), torch.zeros(6, 1), r"not \(6, 3\) and \(6, 1\)"),
        (cox, (6, 3), (torch.ones(6), torch.ones(6)), r"not \(6, 3\), \(6,\), \(6,\)"),
        (cox, (6,), torch.ones(6), r"of shape \(n, 2\) are needed, not \(6,\)"),
        (cox, (6,), torch.ones(6, 3), r"of shape \(n, 2\) are needed, not \(6, 3\)"),
        (cox, (6,), (torch.ones(5), torch.ones(5)), "are needed, not"),
    ],
)
def test_shapes_that_a_loss_does_not_take_are_named(
    loss: Any, outputs: tuple[int, ...], targets: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss(torch.randn(outputs), targets)


def test_a_coefficient_that_is_no_number_is_named() -> None:
    with pytest.raises(ValueError, match=r"terms\.digit\.coefficient=high: a number is needed"):
        Sum({"digit": {"loss": nn.MSELoss(), "coefficient": "high"}})


def test_a_part_that_is_not_there_is_named() -> None:
    loss = Sum({"digit": {"loss": nn.MSELoss(), "output": "nope"}})
    with pytest.raises(ValueError, match=r"terms\.digit\.output=nope: is not in the outputs \(one, two\)"):
        loss({"one": torch.ones(2), "two": torch.ones(2)}, torch.ones(2))
