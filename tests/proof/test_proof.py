"""The proof's own parts: larger batch, draws by sample, couplings, mixtures, certificate, errors."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accumexp.proof import Cause, Certificate, Check, certify
from accumexp.proof.count_wording import WHOLE_GRADIENT, counts_in_words
from accumexp.proof.counts import Decomposition
from accumexp.proof.coupling import NEGLIGIBLE, coupling_modules, loss_couples
from accumexp.proof.evidence import Failure
from accumexp.proof.fixed_draws import fixed_draws
from accumexp.proof.float64 import DOUBLE, keep_float64
from accumexp.proof.gradients import Comparison
from accumexp.proof.larger_batch import call, larger_batch
from accumexp.proof.observation import Observation
from accumexp.proof.problem import Problem, cast, copy_in, rows
from accumexp.proof.rounding import expected_update

from ..support.ranks import on_ranks
from ..support.reference import classification, larger_batch_gradient, relative_error, small_model
from .clean_models import Attention
from .wrong_loops import STEPS, classifier, right, samples, split
from .wrong_ranks import right as right_ranks


def problem_of(model: nn.Module, loss: Any, batch: Any, steps: int = STEPS) -> Problem:
    return Problem(right, model, loss, [batch], steps, lambda p: torch.optim.SGD(p, lr=0.1))


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(torch.rand(5, dtype=DOUBLE), label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum"),
    ],
    ids=("mean", "weights", "sum"),
)
def test_the_larger_batch_is_the_reference(criterion: nn.Module) -> None:
    model, batch = small_model(), classification(23)
    larger = larger_batch(model, criterion, batch)
    assert relative_error(larger.gradient, larger_batch_gradient(model, criterion, *batch)) < 1e-14
    assert all(p.grad is None for p in model.parameters())


def test_parts_of_the_larger_batch_add_up_to_it() -> None:
    """As columns of a mixture do: each with its share of the whole's weight."""
    model, batch = small_model(), classification(12)
    for loss in (nn.CrossEntropyLoss(torch.rand(5, dtype=DOUBLE)), nn.CrossEntropyLoss(reduction="sum")):
        whole = larger_batch(model, loss, batch).gradient
        weight = loss.weight[batch[1]].sum() if loss.weight is not None else 1.0
        parts = [
            larger_batch(model, loss, rows(batch, s), weight=weight).gradient
            for s in (slice(0, 5), slice(5, 12))
        ]
        added = {name: parts[0][name] + parts[1][name] for name in whole}
        assert relative_error(added, whole) < 1e-13


class Noisy(nn.Module):
    """Draws with every operator that can be held fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.4)
        self.alpha = nn.AlphaDropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.alpha(self.drop(x)) + torch.randn_like(x)
        x = x * torch.bernoulli(torch.full_like(x, 0.5)) + torch.rand(x.shape)
        x = x * x.new_empty(len(x), 1).bernoulli_(0.8) + torch.empty_like(x).exponential_(2.0)
        return x + torch.empty_like(x).uniform_(-1.0, 1.0) + torch.empty_like(x).normal_(1.0, 2.0)


@pytest.mark.parametrize("kind", ["noise", "attention"])
def test_a_sample_draws_the_same_in_any_split_and_order(kind: str) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if kind == "noise":
        model, inputs = Noisy().to(DOUBLE), torch.randn(9, 6, generator=generator, dtype=DOUBLE)
    else:
        model, inputs = Attention(0.3).to(DOUBLE), torch.randint(0, 11, (9, 5), generator=generator)
        inputs[:, 0] = torch.arange(9)  # samples that differ
    batch = (inputs, inputs)

    def outputs(order: list[int], sizes: list[int], seed: int = 5) -> Tensor:
        with keep_float64(DOUBLE), fixed_draws(model, batch, seed):
            outputs_in_order = torch.cat([call(model, part) for part in inputs[order].split(sizes)])
        return outputs_in_order[torch.argsort(torch.tensor(order))]

    whole = outputs(list(range(9)), [9])
    for order, sizes in ((list(range(9)), [4, 4, 1]), ([8, 3, 1, 0, 2, 7, 5, 6, 4], [2, 3, 4])):
        torch.testing.assert_close(outputs(order, sizes), whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(outputs(list(range(9)), [9], seed=6), whole)


def test_fixed_dropout_keeps_as_often_as_it_should() -> None:
    drop = nn.Dropout(0.3)
    inputs = torch.ones(200, 50, dtype=DOUBLE) + torch.arange(200, dtype=DOUBLE).unsqueeze(1)
    with fixed_draws(drop, (inputs, inputs), 1):
        kept = drop(inputs) != 0
    assert abs(float(kept.double().mean()) - 0.7) < 5 * math.sqrt(0.21 / 10000)
    assert len({tuple(row) for row in kept.int().tolist()}) == 200


def test_draws_that_cannot_be_held_fixed_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.RReLU())
    certificate = certify(right, model, nn.CrossEntropyLoss(), samples(), STEPS, updates=1)
    assert str(certificate) == (
        "not proved: 1: draws of rrelu_with_noise cannot be held fixed by sample, so nothing is certified"
    )


def test_dropout_is_excused_by_name_and_the_rest_is_proved() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.2), nn.Linear(9, 5))
    certificate = certify(right, model, nn.CrossEntropyLoss(), samples(), STEPS, updates=3)
    assert str(certificate) == "proved up to dropout draws (1 (Dropout), 3 (Dropout))"


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_modules_that_couple_samples_are_found_and_no_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Dropout(0.3), Centred(), nn.Linear(8, 5)
    )  # fmt: skip
    couplings = coupling_modules(problem_of(model, nn.CrossEntropyLoss(), samples()), samples())
    assert [(c.name, c.kind) for c in couplings] == [("2", "BatchNorm1d"), ("4", "Centred")]
    assert all(c.effect > 1e-3 for c in couplings)
    plain = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GroupNorm(2, 8), nn.Dropout(0.3))
    assert coupling_modules(problem_of(plain, nn.CrossEntropyLoss(), samples()), samples()) == []


def info_nce(outputs: Tensor, targets: Tensor) -> Tensor:
    scores = nn.functional.normalize(outputs, dim=1) @ nn.functional.normalize(outputs, dim=1).T
    return nn.functional.cross_entropy(scores / 0.1, torch.arange(len(outputs)).roll(1))


@pytest.mark.parametrize("loss", [info_nce, lambda o, t: o.var(0).mean()], ids=("InfoNCE", "variance"))
def test_losses_that_couple_samples_are_found(loss: Any) -> None:
    assert loss_couples(problem_of(classifier(), loss, samples()), samples()) > 1e-3


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.rand(5) + 0.1), nn.CrossEntropyLoss(reduction="sum")],
)
def test_means_and_sums_do_not_couple_samples(loss: nn.Module) -> None:
    assert loss_couples(problem_of(classifier(), loss, samples()), samples()) <= NEGLIGIBLE


def test_a_norm_over_micro_batches_of_two_is_diagnosed() -> None:
    """Smaller windows would have a micro-batch of one sample, of which the norm has no statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    inputs, targets = samples()

    def pairs(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
        for few, labels in zip(batch[0].split(2), batch[1].split(2), strict=True):
            loss = nn.functional.cross_entropy(model(few), labels, reduction="sum")
            (loss / len(batch[1])).backward()
        optimizer.step()
        optimizer.zero_grad()

    certificate = certify(pairs, model, nn.CrossEntropyLoss(), (inputs[:8], targets[:8]), 4, updates=2)
    assert "1 (BatchNorm1d): statistics over 2 of 8 samples" in str(certificate)
    assert "gradient, ragged last window" in {check.name for check in certificate.checks}


class Balanced(nn.Module):
    """Returns classes and a number for the whole batch, as a mixture of experts does."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(6, 4), nn.Linear(4, 5)

    def forward(self, inputs: Tensor) -> Any:
        shares = self.gate(inputs).softmax(1)
        return {"classes": self.head(shares), "balance": shares.mean(0).square().sum(), "name": "balanced"}


def balanced(outputs: Any, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs["classes"], targets) + outputs["balance"]


def test_an_output_of_the_whole_batch_is_named_in_the_verdict() -> None:
    def window(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
        for inputs, targets in split(batch):
            (balanced(model(inputs), targets) * len(targets) / len(batch[1])).backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    certificate = certify(window, Balanced(), balanced, samples(), STEPS, updates=1)
    assert str(certificate).startswith("not proved: (model) (Balanced), output['balance']: couples samples")


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


def test_a_coupling_loss_and_batch_norm_are_named_in_the_verdict() -> None:
    def window(model: Any, optimizer: Any, batch: Any, steps: int) -> None:
        for inputs, targets in split(batch):
            (info_nce(model(inputs), targets) * len(targets) / len(batch[1])).backward()
        optimizer.step()
        optimizer.zero_grad()

    certificate = certify(window, classifier(), info_nce, samples(), STEPS, updates=1)
    assert str(certificate).startswith("not proved: loss (info_nce): couples samples")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5))
    certificate = certify(right, model, nn.CrossEntropyLoss(), samples(), STEPS, updates=1)
    assert "1 (BatchNorm1d): statistics over 4 of 16 samples" in str(certificate)
    assert {"gradient, fp64", "buffers"} <= {check.name for check in certificate.failed}


def parts_of(problem: Problem, micro: list[list[int]]) -> list[dict[str, Tensor]]:
    model = copy_in(problem.model, DOUBLE)
    batch = cast(problem.batches[0], DOUBLE)
    return [
        larger_batch(model, problem.loss, rows(batch, torch.tensor(m)), weight=16.0).gradient for m in micro
    ]


def decomposed(problem: Problem, gradient: dict[str, Tensor], micro: list[list[int]]) -> Decomposition:
    """The decomposition of `gradient` as that of a window with the micro-batches `micro`."""
    model, batch = copy_in(problem.model, DOUBLE), cast(problem.batches[0], DOUBLE)
    observation = Observation(gradient, steps=1, sizes=[len(m) for m in micro])
    observation.micro_batches = list(micro)
    expected = expected_update(problem, batch, model)
    failure = Failure(batch, observation, expected, Comparison(1.0, 2.0, "", 1.0, 0.0), model)
    return Decomposition(problem, failure, [micro])


@pytest.mark.parametrize(
    "counts", [(1.0, 1.0, 1.0, 1.0), (4.0, 4.0, 4.0, 4.0), (1.0, 0.0, 1.0, 1.0), (0.25, 3.0, -1.0, 0.5)]
)
def test_planted_counts_are_read_back(counts: tuple[float, ...]) -> None:
    problem = problem_of(classifier(), nn.CrossEntropyLoss(), samples())
    micro = [list(range(k, k + 4)) for k in range(0, 16, 4)]
    parts = parts_of(problem, micro)
    planted = {name: sum(c * p[name] for c, p in zip(counts, parts, strict=True)) for name in parts[0]}
    read = decomposed(problem, planted, micro).fit(planted)  # type: ignore[arg-type]
    assert read is not None and read.counts == pytest.approx(counts, abs=1e-7)
    before = {name: planted[name] + 0.5 * torch.randn_like(p) for name, p in parts[0].items()}
    assert decomposed(problem, before, micro).fit(planted) is None


@pytest.mark.parametrize("count", [1, 2])
def test_a_small_window_that_fp32_computes_without_error_has_a_bound(count: int) -> None:
    """Another order of the operations still rounds: measured once, fp32 loses nothing here by chance."""
    model = nn.Linear(2, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, 0.25]]))
        model.bias.zero_()
    batch = torch.tensor([[1.0, 2.0]] * count).double(), torch.zeros(count, 1).double()
    expected = expected_update(problem_of(model, nn.MSELoss(), batch), batch, model)
    assert min(expected.bounds.values()) > 3 * 2.0**-53 * expected.size
    assert max(expected.bounds.values()) < 40 * 2.0**-53 * expected.size


def test_more_micro_batches_than_parameters_still_give_a_factor() -> None:
    torch.manual_seed(0)
    batch = torch.randn(16, 2), torch.randint(0, 2, (16,))
    problem = problem_of(nn.Linear(2, 2, bias=False), nn.CrossEntropyLoss(), batch, 16)
    micro = [[k] for k in range(16)]
    parts = parts_of(problem, micro)
    planted = {name: torch.stack([3.0 * p[name] for p in parts]).sum(0) for name in parts[0]}
    read = decomposed(problem, planted, micro).fit(planted)
    assert read is not None and read.counts == pytest.approx([3.0] * 16)


def test_noise_is_no_sum_of_micro_batches() -> None:
    problem = problem_of(classifier(), nn.CrossEntropyLoss(), samples())
    micro = [list(range(k, k + 4)) for k in range(0, 16, 4)]
    noise = {name: torch.randn_like(value) for name, value in parts_of(problem, micro)[0].items()}
    assert decomposed(problem, noise, micro).fit(noise) is None


@pytest.mark.parametrize(
    ("micro", "reason"),
    [
        ([[0, 1, 2, 3, 4, 5, 6, 7], [10, 11, 12, 13, 14, 15]], "of the batch's samples 8, 9 are never seen"),
        ([list(range(9)), [3, *range(9, 16)]], "of the batch's samples 3 is counted more than once"),
    ],
)
def test_samples_that_are_missing_or_doubled_are_named(micro: list[list[int]], reason: str) -> None:
    problem = problem_of(classifier(), nn.CrossEntropyLoss(), samples())
    parts = parts_of(problem, micro)
    gradient = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    assert counts_in_words(decomposed(problem, gradient, micro), [1.0, 1.0], WHOLE_GRADIENT)[0] == reason


def check(figure: float, bound: float = 1.0, decided: bool = True) -> Check:
    return Check("gradient", figure, bound, "relative", "because", decided=decided)


EXCUSED = Cause("dropout draws", "1 (Dropout)", "draws", 0.1, "", "", excused=True)
FAULT = Cause("wrong denominator", "", "4 times too large", math.nan, "", "")


@pytest.mark.parametrize(
    ("checks", "causes", "verdict"),
    [
        ([check(1.0)], [], "proved"),
        ([check(1.0 + 1e-9)], [], "not proved"),
        ([check(math.nan)], [], "not proved"),
        ([check(0.0, math.nan)], [], "not proved"),
        ([check(math.inf)], [], "not proved"),
        ([check(5.0, decided=False)], [], "proved"),
        ([check(0.0)], [EXCUSED], "proved up to"),
        ([check(0.0)], [EXCUSED, FAULT], "not proved"),
        ([check(2.0)], [EXCUSED], "not proved"),
    ],
)
def test_the_verdict_follows_from_checks_and_causes(checks: Any, causes: Any, verdict: str) -> None:
    certificate = Certificate(checks, causes)
    assert certificate.verdict == verdict
    assert certificate.proved == (verdict != "not proved")


def test_a_certificate_is_strict_json() -> None:
    certificate = Certificate([check(math.nan), check(math.inf)], [FAULT], {"steps": 4}, {}, {"lr": math.nan})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(certificate.as_json(), parse_constant=refuse)
    assert read["verdict"] == "not proved" and read["summary"] == "not proved: 4 times too large"
    assert [c["figure"] for c in read["checks"]] == ["nan", "inf"]
    assert [c["passed"] for c in read["checks"]] == [False, False]


@pytest.mark.parametrize("steps", [0, -1, 17])
def test_steps_that_are_impossible_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps={steps}: a batch of 16 samples cannot be split"):
        certify(right, classifier(), nn.CrossEntropyLoss(), samples(), steps)


def test_a_larger_batch_without_a_finite_gradient_is_refused() -> None:
    inputs, targets = samples()
    inputs[3, 2] = math.nan
    with pytest.raises(ValueError, match="gradient is not finite"):
        certify(right, classifier(), nn.CrossEntropyLoss(), (inputs, targets), STEPS)


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


def equal_samples(dropout: float) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Dropout(dropout), nn.Linear(9, 5))
    inputs, targets = samples()
    batch = inputs[torch.arange(len(inputs)) // 2], targets
    prepare = nn.parallel.DistributedDataParallel
    return str(certify(right_ranks, model, nn.CrossEntropyLoss(), batch, STEPS, updates=3, prepare=prepare))


def test_equal_samples_on_several_ranks_are_all_seen(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path / "plain", equal_samples, 0.0) == ["proved"] * 2
    drawn = "proved up to dropout draws (1 (Dropout))"
    assert on_ranks(2, tmp_path / "drawn", equal_samples, 0.3) == [drawn] * 2


def test_a_bound_that_is_no_number_lets_nothing_pass() -> None:
    for bound in (math.inf, math.nan):
        assert not Check("gradient", 0.1, bound, "relative", "why").passed
