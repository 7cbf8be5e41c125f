"""How often each micro-batch counts in a gradient is read back from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from accumexp.proof.count_wording import WHOLE_GRADIENT, counts_in_words
from accumexp.proof.counts import Decomposition
from accumexp.proof.evidence import Failure
from accumexp.proof.float64 import DOUBLE
from accumexp.proof.gradients import Comparison
from accumexp.proof.larger_batch import larger_batch
from accumexp.proof.observation import Observation
from accumexp.proof.problem import Problem, cast, copy_in, rows
from accumexp.proof.rounding import expected_update

from .problems import problem_of
from .wrong_loops import classifier, samples


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
