"""One window over several ranks is the window of one process: laws 1, 2, 3 and 5 between real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.parallel import DistributedDataParallel

from accumexp.accum import (
    OptimizerStep,
    Window,
    data_parallel,
    fully_sharded,
    rank_share,
    split_sizes,
    steps_for,
)

from ..support.ranks import on_ranks
from ..support.reference import classification, larger_batch_gradient, relative_error, small_model

SAMPLES = 101  # a prime: nothing divides it
WORLDS = [1, 2, 4]
STEPS = [1, 2, 3, 5]
CPU = torch.device("cpu")


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


def own_part(batch: tuple[Tensor, Tensor], steps: int) -> tuple[Tensor, Tensor, int]:
    """This rank's samples, one of padding if it has none, and how many count."""
    parts = rank_share(len(batch[0]), steps, dist.get_rank(), dist.get_world_size())
    chosen = [sample for part in parts for sample in part]
    inputs, targets = (tensor[chosen or [0]] for tensor in batch)
    return inputs, targets, len(chosen)


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "averaging":
        return DistributedDataParallel(model)
    return fully_sharded(model, CPU) if how == "sharded" else data_parallel(model)


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    parameter_gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {
        name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone()  # pyright: ignore
        for name, g in parameter_gradients.items()
        if g is not None
    }


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


UPDATES = 20
CLIP = 0.4


def trained(how: str, steps: int) -> dict[str, Tensor]:
    """Weights after 20 updates, every fourth of them a ragged, smaller one."""
    model = wrapped(small_model(), how)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    window = Window(model, nn.CrossEntropyLoss(), steps)
    step = OptimizerStep(window, optimizer, clip_norm=CLIP)
    for update in range(UPDATES):
        size = SAMPLES if update % 4 != 3 else 7
        now = steps_for(size, SAMPLES, steps)
        inputs, targets, counted = own_part(classification(size), now)
        optimizer.zero_grad(set_to_none=not window.sync.keeps_gradients)
        window.backward(inputs, targets, steps=now, samples=counted)
        step()
    weights = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights.items()}  # pyright: ignore


def grid_trained(how: str) -> dict[int, dict[str, Tensor]]:
    return {steps: trained(how, steps) for steps in STEPS}


def plainly_trained() -> dict[str, Tensor]:
    """The same by hand: momentum, weight decay and clipping written out, the gradient by torch.func."""
    model = small_model()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in weights.items()}
    for update in range(UPDATES):
        inputs, targets = classification(SAMPLES if update % 4 != 3 else 7)

        def objective(
            values: dict[str, Tensor], inputs: Tensor = inputs, targets: Tensor = targets
        ) -> Tensor:
            return nn.functional.cross_entropy(functional_call(model, values, (inputs,)), targets)

        gradient = grad(objective)(weights)
        norm = torch.sqrt(sum((g.square().sum() for g in gradient.values()), torch.zeros(())))
        shrink = min(1.0, CLIP / (norm.item() + 1e-6))
        for name, weight in weights.items():
            velocity[name] = 0.9 * velocity[name] + shrink * gradient[name] + 1e-3 * weight
            weights[name] = weight - 0.1 * velocity[name]
    return weights


@pytest.mark.parametrize(("how", "world"), [("adding", 1), ("adding", 2), ("adding", 4), ("sharded", 3)])
def test_law_1_weights_after_twenty_updates_are_the_larger_batchs(
    tmp_path: Path, how: str, world: int
) -> None:
    expected = plainly_trained()
    for by_steps in on_ranks(world, tmp_path, grid_trained, how):
        for steps, weights in by_steps.items():
            assert relative_error(weights, expected) <= 1e-9, steps


def counted(steps: int, bucket_mib: float) -> tuple[list[int], int]:
    """Buckets that the communication hook saw after each of three windows' micro-batches; their number."""
    model = DistributedDataParallel(small_model(), bucket_cap_mb=bucket_mib, gradient_as_bucket_view=True)
    buckets: set[int] = set()
    calls_now: list[int] = []

    def hook(group: Any, bucket):
        buckets.add(bucket.index())
        calls_now.append(bucket.index())
        work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / dist.get_world_size())

    model.register_comm_hook(None, hook)
    window = Window(model, nn.CrossEntropyLoss(), steps)
    inputs, targets, count = own_part(classification(SAMPLES), steps)
    seen: list[int] = []
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        calls_now.clear()
        window.backward(inputs, targets, samples=count, observe=lambda *_: seen.append(len(calls_now)))
        seen.append(-len(calls_now))
    return seen, len(buckets)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("bucket_mib", [25, 1e-4])
def test_law_5_one_gradient_all_reduce_a_window_in_its_last_micro_batch(
    tmp_path: Path, steps: int, bucket_mib: float
) -> None:
    for seen, buckets in on_ranks(2, tmp_path, counted, steps, bucket_mib):
        assert (buckets > 1) == (bucket_mib < 1)
        for start in range(0, len(seen), steps + 1):
            window = seen[start : start + steps + 1]
            assert window[: steps - 1] == [0] * (steps - 1), "none in the other micro-batches"
            assert -window[-1] <= buckets if start == 0 else -window[-1] == buckets


def profiled(steps: int) -> list[int]:
    """All-reduces in a window by the profiler, as the number of elements of each."""
    model = data_parallel(small_model())
    window = Window(model, nn.CrossEntropyLoss(), steps, local_loss=True)
    inputs, targets, count = own_part(classification(SAMPLES), steps)
    for _ in range(2):
        window.backward(inputs, targets, samples=count)
    with torch.profiler.profile(record_shapes=True) as profile:
        window.backward(inputs, targets, samples=count)
    events = [event for event in profile.events() or [] if event.name == "c10d::allreduce_"]
    shapes = [event.input_shapes[0] for event in events]
    return sorted(
        int(torch.tensor(shape[0] if shape and isinstance(shape[0], list) else shape).prod())
        for shape in shapes
    )


@pytest.mark.parametrize("steps", [1, 4])
def test_law_5_the_profiler_sees_one_gradient_and_one_weight(tmp_path: Path, steps: int) -> None:
    for sizes in on_ranks(2, tmp_path, profiled, steps):
        assert len(sizes) == 2, sizes


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


class Branches(nn.Module):
    """Samples whose first feature is positive go one way, the others another: a rank may use one alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.one, self.other = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.one if bool((inputs[:, 0] > 0).all()) else self.other)(inputs)


def branched() -> dict[str, Tensor]:
    model = data_parallel(Branches().bfloat16(), find_unused_parameters=True)
    inputs, targets = classification(8)
    inputs[:, 0] = 1.0 if dist.get_rank() == 0 else -1.0
    Window(model, nn.CrossEntropyLoss(), 2, fp32_buffers=True).backward(inputs.bfloat16(), targets)
    return whole_gradients(model)


def test_fp32_buffers_agree_where_ranks_use_different_parameters(tmp_path: Path) -> None:
    first, second = on_ranks(2, tmp_path, branched)
    assert first.keys() == second.keys() and len(first) == 4
    assert all(torch.equal(first[name], second[name]) and first[name].any() for name in first)


def in_bf16(steps: int) -> dict[str, Tensor]:
    model = data_parallel(small_model().bfloat16())
    inputs, targets, count = own_part(classification(64), steps)
    window = Window(model, nn.CrossEntropyLoss(), steps, fp32_buffers=True)
    window.backward(inputs.bfloat16(), targets, samples=count)
    return whole_gradients(model)


def test_fp32_buffers_add_over_ranks_before_they_round(tmp_path: Path) -> None:
    """Every rank holds the same bits, and more micro-batches do not make them worse."""
    inputs, targets = classification(64)
    model = small_model().bfloat16().double()
    expected = larger_batch_gradient(model, nn.CrossEntropyLoss(), inputs.bfloat16().double(), targets)
    for steps in (2, 16):
        first, second = on_ranks(2, tmp_path / str(steps), in_bf16, steps)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert relative_error({n: g.double() for n, g in first.items()}, expected) < 2e-2


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


def never_synchronised(steps: int) -> dict[str, Tensor]:
    """The last micro-batch in `no_sync` too: every rank keeps its own part."""
    model = data_parallel(small_model())
    inputs, targets, count = own_part(classification(SAMPLES), steps)
    window = Window(model, nn.CrossEntropyLoss(), steps)
    window.sync.micro_batch = lambda last: model.no_sync()  # type: ignore[method-assign]
    window.backward(inputs, targets, samples=count)
    return whole_gradients(model)


def test_a_window_that_never_synchronises_would_be_seen(tmp_path: Path) -> None:
    expected = larger_batch_gradient(small_model(), nn.CrossEntropyLoss(), *classification(SAMPLES))
    rank_gradients = on_ranks(2, tmp_path, never_synchronised, 3)
    assert all(relative_error(gradient, expected) > 1e-3 for gradient in rank_gradients)
