"""The proof runs a loop as a user does: all is left as it was, and unusual loops are judged rightly."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accumexp.proof import certify

from .wrong_loops import STEPS, classifier, right, samples, split


class Late(nn.Module):
    """Uses its branch from the second batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.branch = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.always(inputs)
        return outputs + self.branch(inputs) if bool(inputs[0, 0] > 5) else outputs


def test_a_parameter_whose_first_gradient_comes_late_is_proved_with_a_fused_optimizer() -> None:
    torch.manual_seed(0)
    inputs, targets = samples()
    later = inputs.clone()
    later[:, 0] = 9.0
    optimizer = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True)  # noqa: E731

    def window(model: Any, fused: Any, batch: Any, steps: int) -> None:
        for parameter in model.parameters():
            if fused.state and "momentum_buffer" not in fused.state[parameter]:
                fused.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        right(model, fused, batch, steps)

    batches = [(inputs, targets), (later, targets)]
    certificate = certify(
        window, Late(), nn.CrossEntropyLoss(), batches, STEPS, optimizer=optimizer, updates=4
    )
    assert certificate.proved, certificate


@pytest.mark.parametrize("steps", [0, -1, 17])
def test_steps_that_are_impossible_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps={steps}: a batch of 16 samples cannot be split"):
        certify(right, classifier(), nn.CrossEntropyLoss(), samples(), steps)


def test_the_proof_leaves_everything_as_it_was() -> None:
    model, batch, loss = classifier(), samples(), nn.CrossEntropyLoss(torch.rand(5))
    model(batch[0]).sum().backward()
    before = {
        name: (p.detach().clone(), p.grad.clone())
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    torch.manual_seed(7)
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    def drawing(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1 + 0 * float(torch.rand(())))

    certify(right, model, loss, batch, STEPS, optimizer=drawing, updates=2)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_default_dtype() is dtype
    assert loss.weight is not None and loss.weight.dtype is torch.float32
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert before.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert p.dtype is torch.float32 and torch.equal(p, before[name][0])
        assert p.grad is not None and torch.equal(p.grad, before[name][1])


def test_a_loop_that_fails_says_so_itself() -> None:
    def fails(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
        raise KeyError("mine")

    dtype = torch.get_default_dtype()
    with pytest.raises(KeyError, match="mine") as raised:
        certify(fails, classifier(), nn.CrossEntropyLoss(), samples(), STEPS)
    assert raised.traceback[-1].name == "fails"
    assert torch.get_default_dtype() is dtype


def test_a_loop_that_narrows_is_right_in_fp64_too() -> None:
    def narrows(model: Any, optimizer: Any, batch: Any, steps: int) -> Tensor:
        logged = torch.zeros(())
        for inputs, targets in split(batch):
            outputs = model(inputs.clone()).float()
            loss = nn.functional.cross_entropy(outputs, targets, reduction="sum") / len(batch[1])
            loss.backward()
            logged += loss.detach().float()
        optimizer.step()
        optimizer.zero_grad()
        return logged

    certificate = certify(narrows, classifier(), nn.CrossEntropyLoss(), samples(15), STEPS, updates=5)
    assert str(certificate) == "proved"


def test_a_class_per_sample_needs_no_ignored_targets() -> None:
    names = [
        c.name
        for c in certify(right, classifier(), nn.CrossEntropyLoss(), samples(), STEPS, updates=1).checks
    ]
    assert "gradient, weighted items" not in names
    inputs, targets = samples()
    targets[3] = -100
    certificate = certify(right, classifier(), nn.CrossEntropyLoss(), (inputs, targets), STEPS, updates=1)
    assert "gradient, weighted items" in [c.name for c in certificate.failed]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerates_documented_loop_is_right_only_where_steps_divide() -> None:
    from .documented_loops import certified

    classes, tokens = certified("classes", 6), certified("tokens", 6)
    by_name = {c.name: c for c in classes.checks}
    assert by_name["gradient, fp64"].passed
    assert not by_name["gradient, ragged last window"].passed
    assert "3 micro-batches divided by 4" in str(classes)
    assert "count alike, though they weigh (5, 12, 20, 28)" in str(tokens)
    assert str(certified("one step", 6)) == "proved"


def few_are_skipped(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
    """Leaves out a last micro-batch of one sample, as loops with BatchNorm do."""
    for inputs, targets in split(batch):
        if len(targets) > 1:
            (nn.functional.cross_entropy(model(inputs), targets, reduction="sum") / len(batch[1])).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_last_micro_batch_of_one_sample_is_tried() -> None:
    certificate = certify(few_are_skipped, classifier(), nn.CrossEntropyLoss(), samples(), STEPS, updates=1)
    assert str(certificate).startswith("not proved: of the batch's samples 12 is never seen")
