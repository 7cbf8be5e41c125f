"""One window over several ranks is the window of one process: laws 1, 2 and 3 between real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from accumexp.accum import Window, data_parallel, rank_share, split_sizes

from ..support.ranks import on_ranks
from ..support.reference import classification, larger_batch_gradient, relative_error, small_model
from .windows import SAMPLES, STEPS, own_part, whole_gradients, wrapped

WORLDS = [1, 2, 4]


class TokenMean:
    """A mean over valid tokens: samples weigh what they have of them."""

    def weight(self, targets: Tensor) -> Tensor:
        return (targets >= 0).sum()

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.movedim(-1, 1), targets, ignore_index=-1, reduction="sum")


class Tokens(nn.Module):
    """A class for each of 7 tokens, from a sample's 6 features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7 * 5)).double()

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features).view(-1, 7, 5).clone()


def tokens(samples: int) -> tuple[Tensor, Tensor]:
    """Samples of 0 to 7 valid tokens."""
    features, _ = classification(samples)
    generator = torch.Generator().manual_seed(samples + 1)
    targets = torch.randint(0, 5, (samples, 7), generator=generator)
    lengths = torch.randint(0, 8, (samples, 1), generator=generator)
    return features, targets.where(torch.arange(7) < lengths, -1)


CASES: dict[str, tuple[Any, Any, Any]] = {
    "samples": (small_model, classification, nn.CrossEntropyLoss()),
    "class weights": (
        small_model,
        classification,
        nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 0.1, 2.0, 0.0], dtype=torch.float64), ignore_index=2),
    ),
    "tokens": (Tokens, tokens, TokenMean()),
}


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.movedim(-1, 1), targets, ignore_index=-1)


def grid(how: str, case: str, samples: int, options: dict[str, Any]) -> dict[int, Any]:
    """For every number of steps, two windows in a row: gradient and loss of the second."""
    make, data, loss = CASES[case]
    results = {}
    for steps in STEPS:
        model = wrapped(make(), how)
        window = Window(model, loss, steps, **options)
        inputs, targets, counted = own_part(data(samples), steps)
        window.backward(inputs, targets, samples=counted)
        model.zero_grad(set_to_none=not window.sync.keeps_gradients)
        result = window.backward(inputs, targets, samples=counted)
        results[steps] = (whole_gradients(model), float(result.loss), float(result.weight))
    return results


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_law_1_every_ranks_gradient_is_the_whole_batchs(tmp_path: Path, world: int, case: str) -> None:
    make, data, loss = CASES[case]
    inputs, targets = data(SAMPLES)
    criterion = token_loss if case == "tokens" else loss
    expected = larger_batch_gradient(make(), criterion, inputs, targets)
    expected_loss = criterion(make()(inputs), targets).item()
    for by_steps in on_ranks(world, tmp_path, grid, "adding", case, SAMPLES, {}):
        for steps, (gradient, loss_value, weight) in by_steps.items():
            assert relative_error(gradient, expected) <= 1e-12, steps
            assert loss_value == pytest.approx(expected_loss, rel=1e-12)
            if case == "tokens":
                assert weight == (targets >= 0).sum(), "law 2: the weight is counted over all ranks"


@pytest.mark.parametrize("how", ["averaging", "sharded"])
def test_law_1_holds_for_a_model_that_others_wrapped_and_for_a_sharded_one(tmp_path: Path, how: str) -> None:
    inputs, targets = tokens(SAMPLES)
    expected = larger_batch_gradient(Tokens(), token_loss, inputs, targets)
    options: list[dict[str, Any]] = [{}, {"reduce_every_micro_batch": True}]
    for number, option in enumerate(options if how == "sharded" else options[:1]):
        for by_steps in on_ranks(3, tmp_path / str(number), grid, how, "tokens", SAMPLES, option):
            for steps, (gradient, _, _) in by_steps.items():
                assert relative_error(gradient, expected) <= 1e-12, steps


@pytest.mark.parametrize("samples", [1, 3, 6])
@pytest.mark.parametrize("how", ["adding", "sharded"])
def test_law_3_a_window_with_fewer_samples_than_micro_batches_is_exact(
    tmp_path: Path, samples: int, how: str
) -> None:
    """Ranks without a sample pad with one that weighs nothing."""
    inputs, targets = classification(samples)
    expected = larger_batch_gradient(small_model(), nn.CrossEntropyLoss(), inputs, targets)
    for by_steps in on_ranks(4, tmp_path, grid, how, "samples", samples, {}):
        for gradient, _, weight in by_steps.values():
            assert relative_error(gradient, expected) <= 1e-12
            assert weight == samples


def test_padding_weighs_nothing_whatever_it_holds(tmp_path: Path) -> None:
    inputs, targets = classification(10)
    expected = larger_batch_gradient(small_model(), nn.CrossEntropyLoss(), inputs, targets)
    for gradient in on_ranks(2, tmp_path, padded_by_the_caller):
        assert relative_error(gradient, expected) <= 1e-12


def padded_by_the_caller() -> dict[str, Tensor]:
    """Six rows a rank of ten samples, as a sampler that repeats samples would feed them."""
    inputs, targets = classification(10)
    rank = dist.get_rank()
    rows = [list(range(6)), [6, 7, 8, 9, 0, 1]][rank]
    model = data_parallel(small_model())
    window = Window(model, nn.CrossEntropyLoss(), 2)
    window.backward(inputs[rows], targets[rows], samples=[6, 4][rank])
    return whole_gradients(model)


def sums_of_means(steps: int) -> dict[str, Tensor]:
    model = data_parallel(small_model())
    inputs, targets, counted = own_part(classification(SAMPLES), steps)
    Window(model, nn.CrossEntropyLoss(), steps, reduction="sum").backward(inputs, targets, samples=counted)
    return whole_gradients(model)


@pytest.mark.parametrize("world", [2, 4])
def test_law_1_the_sum_of_means_does_not_depend_on_the_ranks(tmp_path: Path, world: int) -> None:
    steps = 3
    inputs, targets = classification(SAMPLES)
    expected: dict[str, Tensor] = {}
    pieces = zip(*(t.split(split_sizes(SAMPLES, steps)) for t in (inputs, targets)), strict=True)
    for inputs_k, targets_k in pieces:
        part = larger_batch_gradient(small_model(), nn.CrossEntropyLoss(), inputs_k, targets_k)
        expected = {name: expected.get(name, 0) + value for name, value in part.items()}
    for gradient in on_ranks(world, tmp_path, sums_of_means, steps):
        assert relative_error(gradient, expected) <= 1e-12


def of_a_sum(reduction: Any) -> tuple[dict[str, Tensor], float]:
    model = data_parallel(small_model())
    inputs, targets, count = own_part(classification(SAMPLES), 3)
    window = Window(model, nn.CrossEntropyLoss(reduction="sum"), 3, reduction=reduction)
    result = window.backward(inputs, targets, samples=count)
    return whole_gradients(model), float(result.loss)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_law_1_a_criterion_that_is_a_sum_is_divided_by_nothing(tmp_path: Path, reduction: str) -> None:
    batch = classification(SAMPLES)
    expected = larger_batch_gradient(small_model(), nn.CrossEntropyLoss(reduction="sum"), *batch)
    loss = nn.functional.cross_entropy(small_model()(batch[0]), batch[1], reduction="sum").item()
    for gradient, loss_value in on_ranks(2, tmp_path, of_a_sum, reduction):
        assert relative_error(gradient, expected) <= 1e-12
        assert loss_value == pytest.approx(loss, rel=1e-12)


def test_rank_shares_are_a_partition_and_the_same_micro_batches_at_any_number_of_ranks() -> None:
    for samples in (1, 3, 7, 16, 101):
        for steps in (1, 2, 3, 5):
            whole = rank_share(samples, steps, 0, 1)
            for ranks in (2, 3, 4):
                shares = [rank_share(samples, steps, rank, ranks) for rank in range(ranks)]
                for k in range(steps):
                    together = [sample for share in shares for sample in share[k]]
                    assert together == list(whole[k])
                for share in shares:
                    sizes = [len(part) for part in share]
                    assert sizes == split_sizes(sum(sizes), steps, empty=True), "as the window will split it"
