"""Loops and models that are right in unusual ways are proved, and the same loops with a fault are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from accumexp.proof import Certificate, certify
from accumexp.proof.arguments import told_apart
from accumexp.proof.coupling import whole_batch_outputs
from accumexp.proof.float64 import DOUBLE, keep_float64
from accumexp.proof.larger_batch import larger_batch
from accumexp.proof.nested import batch_size, cloned, map_tensors, tensors, tensors_by_path
from accumexp.proof.problem import Problem, copy_in, rows
from accumexp.proof.rounding import larger_batch_of
from accumexp.proof.sample_ids import SampleIds

from . import unusual_models
from .unusual_loops import CASES, STEPS, Case, loop, of_output, summed
from .unusual_models import (
    Cache,
    Checkpointed,
    Complex,
    Named,
    Output,
    Stored,
    WithLabels,
    classifier,
    labels,
    numbers,
    tokens,
)


def certified(case: Case, lose: bool = False, updates: int = 3) -> Certificate:
    torch.manual_seed(1)
    return certify(
        case.make(lose), case.model(), case.loss, case.batch(), STEPS, updates=updates, **case.options
    )


def explained(certificate: Certificate) -> str:
    failed = [f"{c.name}: {c.figure:.3g} > {c.bound:.3g} ({c.detail})" for c in certificate.failed]
    return "\n".join([str(certificate), *failed])


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_right_loops_are_proved_and_a_lost_micro_batch_is_not(name: str) -> None:
    case = CASES[name]
    certificate = certified(case)
    only_memory = {check.name for check in certificate.failed} == {"saved activations"}
    assert str(certificate).startswith(case.verdict) or only_memory, explained(certificate)
    wrong = certified(case, lose=True, updates=1)
    assert not wrong.proved, explained(wrong)


class Learned(nn.Module):
    """A loss with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs * self.scale, targets)


def test_the_larger_batch_changes_neither_its_arguments_nor_the_losss_own_weights() -> None:
    loss = Learned()
    loss.scale.grad = torch.full((5,), 3.0)
    model, x = classifier(), numbers()
    larger = larger_batch(model, loss, (x, labels()))
    assert loss.scale.grad is not None and loss.scale.grad.tolist() == [3.0] * 5
    assert all(p.grad is None for p in model.parameters()) and not x.requires_grad
    assert set(larger.gradient) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_draws_again_what_it_drew(
    reentrant: bool, functional: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = Checkpointed(reentrant, functional), (numbers(), labels())
    problem = Problem(loop(cross_entropy), model, cross_entropy, [batch], STEPS, SGD, fixed_draws=True)
    in_fp64 = copy_in(model, DOUBLE)
    checkpointed = larger_batch_of(problem, in_fp64, batch).gradient
    monkeypatch.setattr(unusual_models, "checkpoint", lambda function, x, **_: function(x))
    for name, gradient in larger_batch_of(problem, in_fp64, batch).gradient.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-12, atol=1e-14)


def test_copies_have_the_complex_parts_and_plain_constants_in_their_precision() -> None:
    model = Complex()
    copied = copy_in(model, DOUBLE)
    assert copied.weight.dtype is torch.complex128
    torch.testing.assert_close(copied.weight, model.weight.to(torch.complex128))
    stored = Stored()
    stored(numbers())
    assert copy_in(stored, DOUBLE).constant.dtype is DOUBLE
    assert not copy_in(stored, DOUBLE).hidden.requires_grad
    assert copy_in(copy_in(stored, DOUBLE), torch.bfloat16).constant.dtype is torch.float32


def test_bytes_and_masks_become_fp64_within_the_fp64_proof() -> None:
    with keep_float64(DOUBLE):
        assert torch.ones(3, dtype=torch.uint8).float().dtype is DOUBLE
        assert (torch.ones(3) > 0).to(torch.bfloat16).dtype is DOUBLE
        assert torch.ones((), dtype=torch.int64).float().dtype is torch.float32


def test_what_is_no_tensor_passes_through_a_batch() -> None:
    inputs = {
        "x": numbers(),
        "n": torch.tensor(16),
        "c": Cache(),
        "w": [1.5, None, "word"],
        "o": Named(labels(), 2),
    }
    first, _ = rows((inputs, None), slice(0, 3))
    assert batch_size(first) == 3 and first["n"] is inputs["n"] and first["c"] is inputs["c"]
    assert first["w"] == [1.5, None, "word"] and isinstance(first["o"], Named) and first["o"].extra == 2
    copied = cloned(inputs)
    assert copied["c"] is not inputs["c"] and copied["x"] is not inputs["x"]
    output = Output(numbers(), labels(), {"a": [numbers()]})
    assert [path for path, _ in tensors_by_path(output)] == [".loss", ".logits", ".extra['a'][0]"]
    assert tensors(map_tensors(lambda t: t * 0, output))[2].count_nonzero() == 0
    assert len(tensors(output)) == 3 and bool(output.loss.any())
    output.extra = output  # a circle
    assert len(tensors(output)) == 2


def test_rows_are_recognised_by_the_columns_that_a_call_has() -> None:
    x, y = numbers(), torch.arange(16)
    ids = SampleIds({"x": x, "y": y}, targets=-y)
    order = torch.tensor([5, 0, 11])
    assert ids.find([x[order], {"mask": torch.ones(3, 6)}, None, "train"]) == [5, 0, 11]
    assert ids.find([x[order] + 1, y[order]]) == [5, 0, 11]
    assert ids.find([-y[order]]) == [5, 0, 11]
    assert ids.find([x[4]]) == [4]
    assert ids.find([x[order] + 1]) is None
    assert ids.find([x[order].unsqueeze(1).double()]) == [5, 0, 11]
    # A position that looks like another sample's label does not outweigh the sample itself.
    assert ids.find([x[order], torch.arange(3)]) == [5, 0, 11]
    assert ids.find([torch.ones(0, 6)]) == []


def test_rows_that_several_samples_have_are_not_guessed() -> None:
    ids = SampleIds((numbers(), labels()))
    assert ids.find([labels()[:4]]) is None
    equal = SampleIds(torch.ones(4, 2))
    assert [equal.find(torch.ones(2, 2)) for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]
    # Labels tell samples of equal inputs apart.
    assert SampleIds(torch.ones(4, 2), targets=torch.arange(4)).find(
        [torch.ones(2, 2), torch.tensor([3, 1])]
    ) == [3, 1]


def test_equal_samples_are_told_apart_by_noise_that_the_certificate_names() -> None:
    batch = torch.ones(16, 6), labels()
    certificate = certify(loop(cross_entropy), classifier(), cross_entropy, batch, STEPS, updates=1)
    note = "samples 0 and 1 and 14 more of batch 0 were equal: 1 % noise was added to tell them apart"
    assert certificate.proved and list(certificate.notes) == [note]
    assert torch.equal(batch[0], torch.ones(16, 6))

    def first_again(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
        x, y = batch
        optimizer.zero_grad()
        for part in y.split(4):
            (cross_entropy(model(x[: len(part)]), part) * len(part) / len(y)).backward()
        optimizer.step()

    assert not certify(first_again, classifier(), cross_entropy, batch, STEPS, updates=1).proved


def test_noise_keeps_the_dtype_and_the_range_of_a_column() -> None:
    x = torch.rand(8, 5).bfloat16()
    x[3] = x[5]
    [((noisy, count), _)], _ = told_apart([((x, torch.tensor(8)), labels(8))])
    assert noisy.dtype is torch.bfloat16 and noisy.min() >= x.min() and noisy.max() <= x.max()
    assert torch.equal(noisy[:5], x[:5]) and not torch.equal(noisy[5], x[5]) and count == 8
    [(zeros, _)], _ = told_apart([(torch.zeros(4, 3), labels(4))])
    assert len({tuple(row) for row in zeros.tolist()}) == 4


def test_equal_tokens_are_refused_or_noted() -> None:
    few = torch.ones(8, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="samples 0 and 1 and 6 more of 8 are equal, so micro-batches"):
        told_apart([(few, torch.zeros(8))])
    assert told_apart([(few, torch.arange(8))])[1] == []
    batches, notes = told_apart(
        [(tokens(8), labels(8)), (tokens(8)[[0, 0, 2, 3, 4, 5, 6, 7]], labels(8)[[1] * 8])]
    )
    assert notes == ["samples 0 and 1 of batch 1 are equal: the loop may take one for the other"]
    assert torch.equal(batches[1][0][1], tokens(8)[0])


def noisy_inputs(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
    loop(cross_entropy, before=lambda x: x + 0.1 * torch.randn_like(x))(model, optimizer, batch, steps)


def test_draws_and_changes_of_the_loop_itself_are_the_cause() -> None:
    batch = numbers(), labels()
    noisy = certify(noisy_inputs, classifier(), cross_entropy, batch, STEPS, updates=1)
    assert "the loop itself draws (randn_like)" in str(noisy)
    halved = certify(
        loop(cross_entropy, before=lambda x: x.div_(2)), classifier(), cross_entropy, batch, STEPS, updates=1
    )
    assert "the loop changes its samples" in str(halved)


def test_a_loss_that_the_model_returns_does_not_couple_samples() -> None:
    batch = {"input_ids": tokens(), "labels": labels()}, None
    problem = Problem(loop(of_output), WithLabels().eval(), of_output, [batch], STEPS, SGD)
    assert whole_batch_outputs(problem, batch) == []


def test_losses_after_all_forward_passes_have_the_draws_of_their_samples() -> None:
    """The window keeps all graphs, and that alone is reported."""

    def after_all(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
        optimizer.zero_grad()
        outputs = [model(part) for part in batch[0].split(4)]
        CASES["draws in a loss function"].loss(torch.cat(outputs), batch[1]).backward()
        optimizer.step()

    loss = CASES["draws in a loss function"].loss
    for train_window in (after_all, summed(loss)):
        certificate = certify(train_window, classifier(), loss, (numbers(), labels()), STEPS, updates=2)
        assert [check.name for check in certificate.failed] == ["saved activations"]


def test_a_list_with_an_entry_for_each_sample_is_refused() -> None:
    images = [torch.rand(3, 4, 5), torch.rand(2, 6, 5), torch.rand(3, 4, 4)]
    with pytest.raises(ValueError, match="a list with an entry for each sample is no batch"):
        certify(loop(cross_entropy), classifier(), cross_entropy, (images, labels(3)), 1)


def test_memory_that_torch_func_does_not_show_is_undecided() -> None:
    checks = {check.name: check for check in certified(CASES["torch.func"], updates=1).checks}
    assert not checks["saved activations"].decided and checks["samples"].figure == 0
