"""Out of memory on any rank: all go back and split alike, and the gradient is the whole batch's."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from accumexp.accum import OutOfMemory, Recovery, Window, data_parallel, fully_sharded
from accumexp.training.out_of_memory import OutOfMemoryHandler

from ..support.ranks import on_ranks
from ..support.reference import classification, larger_batch_gradient, relative_error
from ..support.short import Short, left_behind, stateful, stateless
from .windows import CPU, Branches, own_part, whole_gradients

SAMPLES, STEPS = 64, 4
# Where each rank fails: micro-batches by the number of the forward pass, counted on through retries.
PLACES: dict[str, tuple[set[int], set[int]]] = {
    **{f"rank 0 in {k}": ({k}, set()) for k in (0, 2, 3)},
    **{f"rank 1 in {k}": (set(), {k}) for k in (0, 2, 3)},
    "both at once": ({1}, {1}),
    "both, not at once": ({0}, {3}),
    "again in the second try": ({1, 2 + 5}, set()),
    "one, then the other": ({3}, {STEPS + 2}),
}
MADE = {"again in the second try": 16, "one, then the other": 16}


def wrapped(model: nn.Module, how: str) -> DistributedDataParallel:
    return DistributedDataParallel(model) if how == "averaging" else data_parallel(model)


def begin() -> None:
    torch.manual_seed(11 + dist.get_rank())
    random.seed(11 + dist.get_rank())


def bits(model: DistributedDataParallel) -> dict[str, Any]:
    state = left_behind(model.module)
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def disturbed(how: str, where: str) -> dict[str, Any]:
    """By place: what failed, what two windows leave on this rank, and how undisturbed ones differ."""
    gc.freeze()  # what the process began with: it is collected after every failure
    by_place: dict[str, Any] = {}
    inputs, targets, count = own_part(classification(SAMPLES), STEPS)
    for name, places in PLACES.items():
        events: list[OutOfMemory] = []
        model = wrapped(stateful(Short(places[dist.get_rank()], where)), how)
        recovery = Recovery(Window(model, nn.CrossEntropyLoss(), STEPS), events.append)
        begin()
        results = []
        for _ in range(2):
            model.zero_grad(set_to_none=False)
            results.append(recovery.backward(inputs, targets, samples=count))
        left = bits(model)
        plain = wrapped(stateful(Short()), how)
        window = Window(plain, nn.CrossEntropyLoss(), MADE.get(name, 2 * STEPS))
        begin()
        losses = []
        for _ in range(2):
            plain.zero_grad(set_to_none=False)
            losses.append(float(window.backward(inputs, targets, samples=count).loss))
        right = bits(plain)
        different = [key for key in left if not same(left[key], right[key])]
        made = [(float(result.loss), result.steps, float(result.weight)) for result in results]
        by_place[name] = (events, different, made, losses, left["grad 0.weight"])
    return by_place


def same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("how", ["adding", "averaging"])
def test_out_of_memory_on_any_rank_gives_the_finer_windows_bits_on_all(
    tmp_path: Path, how: str, where: str
) -> None:
    first, second = on_ranks(2, tmp_path, disturbed, how, where)
    for name, places in PLACES.items():
        steps = MADE.get(name, 2 * STEPS)
        for events, different, made, losses, _ in (first[name], second[name]):
            assert not different, name
            assert made == [(loss, steps, SAMPLES) for loss in losses], name
            assert len(events) == (1 if steps == 8 else 2)
            assert events[-1].at_most == SAMPLES / 2 / steps
        assert first[name][0] == second[name][0], "all ranks know the same of it"
        failing = 0 if places[0] else 1
        event = first[name][0][0]
        assert (event.rank, event.micro_batch, event.steps) == (failing, min(places[failing]), STEPS)
        assert torch.equal(first[name][-1], second[name][-1]), "ranks agree"


def exact(samples: int) -> list[Any]:
    """Gradients where a rank has fewer samples than micro-batches, or none, and one rank fails."""
    results = []
    for failing in (0, 1):
        if failing and samples < 2:
            continue  # rank 1 has only padding
        at = {1} if dist.get_rank() == failing else set()
        model = data_parallel(stateless(Short(at)))
        window = Window(model, nn.CrossEntropyLoss(), 2)
        inputs, targets, count = own_part(classification(samples), 2)
        result = Recovery(window).backward(inputs, targets, samples=count)
        results.append((whole_gradients(model), result.steps, float(result.loss)))
    return results


@pytest.mark.parametrize("samples", [7, 61])
def test_law_3_ragged_shares_of_ranks_stay_exact(tmp_path: Path, samples: int) -> None:
    batch = classification(samples)
    expected = larger_batch_gradient(stateless(Short()), nn.CrossEntropyLoss(), *batch)
    loss = nn.functional.cross_entropy(stateless(Short())(batch[0]), batch[1]).item()
    for results in on_ranks(2, tmp_path, exact, samples):
        assert len(results) == 2
        for gradient, steps, own_loss in results:
            assert relative_error(gradient, expected) <= 1e-12
            assert own_loss == pytest.approx(loss, rel=1e-12) and steps == 4


def alike() -> list[bool]:
    """Fp32 buffers, parameters that only one rank uses: as without trouble, to the bit."""
    inputs, targets, count = own_part(classification(SAMPLES), STEPS)
    matches = []

    def both(make: Any, inputs: Tensor, **options: Any) -> None:
        gradients = []
        for short in (Short({2} if dist.get_rank() else ()), None):
            model = make(short or Short())
            window = Window(model, nn.CrossEntropyLoss(), STEPS if short else 2 * STEPS, **options)
            backward = Recovery(window).backward if short else window.backward
            for _ in range(2):
                model.zero_grad(set_to_none=False)
                backward(inputs, targets, samples=count)
            gradients.append(whole_gradients(model))
        one, other = gradients
        matches.append(one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one))

    low = inputs.bfloat16()
    both(lambda short: data_parallel(stateless(short).bfloat16()), low, fp32_buffers=True)
    own_way = inputs.clone().float()
    own_way[:, 0] = 1.0 if dist.get_rank() == 0 else -1.0

    def branches(short: Short) -> nn.Module:
        model = nn.Sequential(Branches(), short, nn.Linear(5, 5), nn.Linear(5, 5))
        model[3].requires_grad_(False)
        return data_parallel(model, find_unused_parameters=True)

    both(branches, own_way)
    return matches


def test_fp32_buffers_and_unused_parameters_are_as_in_the_finer_window(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path, alike) == [[True] * 2] * 2


def shared(fp32_buffers: bool) -> list[bool]:
    """Whether this rank's statistics are the first one's in each of four windows."""
    model = data_parallel(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5)).double())
    window = Window(model, nn.CrossEntropyLoss(), STEPS, fp32_buffers=fp32_buffers)
    inputs, targets, count = own_part(classification(SAMPLES), STEPS)
    matches: list[bool] = []

    def look(module: Any, _: Any) -> None:
        if window.under_way == 0:
            first = module.running_mean.clone()
            dist.broadcast(first, 0)
            matches.append(torch.equal(first, module.running_mean))

    model.module[0].register_forward_pre_hook(look)
    recovery = Recovery(window)
    for _ in range(4):
        model.zero_grad(set_to_none=False)
        recovery.backward(inputs, targets, samples=count)
    return matches


@pytest.mark.parametrize("fp32_buffers", [False, True])
def test_every_window_begins_with_the_first_ranks_buffers(tmp_path: Path, fp32_buffers: bool) -> None:
    assert on_ranks(2, tmp_path, shared, fp32_buffers) == [[True] * 4] * 2


class Weighed:
    """A loss whose count fails on the last rank, once."""

    def __init__(self) -> None:
        self.fails = dist.get_rank() == dist.get_world_size() - 1

    def weight(self, targets: Tensor) -> float:
        if self.fails:
            self.fails = False
            raise torch.OutOfMemoryError
        return float(len(targets))

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="sum")


def trouble() -> list[Any]:
    results: list[Any] = []
    inputs, targets, count = own_part(classification(SAMPLES), STEPS)
    model = data_parallel(stateless(Short()))
    result = Recovery(Window(model, Weighed(), STEPS)).backward(inputs, targets, samples=count)
    results += [whole_gradients(model), float(result.weight)]
    # The other rank could go on: it hears that this one cannot, at one sample.
    model = data_parallel(stateless(Short(range(99) if dist.get_rank() else ())))
    recovery = Recovery(Window(model, nn.CrossEntropyLoss(), 1))
    try:
        recovery.backward(inputs[: 4 - 2 * dist.get_rank()], targets[: 4 - 2 * dist.get_rank()])
    except torch.OutOfMemoryError as error:
        results.append(str(error))
    try:
        Recovery(Window(fully_sharded(stateless(Short()), CPU), nn.CrossEntropyLoss(), 1))
    except ValueError as error:
        results.append(str(error))
    model = data_parallel(nn.Sequential(nn.Identity(), nn.Linear(6, 5)))
    model.module[0] = nn.SyncBatchNorm(6)  # DDP takes none on a CPU
    window = Window(model, nn.CrossEntropyLoss(), 1)
    try:
        Recovery(window)
    except ValueError as error:
        results.append(str(error))
    results.append(OutOfMemoryHandler(window, recover=True).recovery is None)
    return results


def test_the_count_that_fails_and_the_sample_that_never_fits_hold_up_nobody(tmp_path: Path) -> None:
    expected = larger_batch_gradient(stateless(Short()), nn.CrossEntropyLoss(), *classification(SAMPLES))
    for gradient, weight, hopeless, sharded, batch_norm, without in on_ranks(2, tmp_path, trouble):
        assert relative_error(gradient, expected) <= 1e-12 and weight == SAMPLES
        assert "one sample in a micro-batch is too much on rank 1" in hopeless
        assert "fully sharded" in sharded
        assert batch_norm.startswith("SyncBatchNorm waits") and without


def counted(steps: int, bucket_mib: float) -> tuple[list[int], int, bool]:
    """Buckets reduced after each micro-batch and each of three windows, the second of which fails once."""
    short = Short({steps} if dist.get_rank() else ())
    model = DistributedDataParallel(stateless(short), bucket_cap_mb=bucket_mib, gradient_as_bucket_view=True)
    buckets: set[int] = set()
    calls: list[int] = []

    def hook(group: Any, bucket):
        buckets.add(bucket.index())
        calls.append(bucket.index())
        work: Any = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / dist.get_world_size())

    model.register_comm_hook(None, hook)
    recovery = Recovery(Window(model, nn.CrossEntropyLoss(), steps))
    inputs, targets, count = own_part(classification(SAMPLES), steps)
    during: list[int] = []
    after: list[int] = []
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        calls.clear()
        recovery.backward(inputs, targets, samples=count, observe=lambda *_: during.append(len(calls)))
        after.append(len(calls))
    views = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    return [*after, sum(during)], len(buckets), len(views) == len(buckets)


@pytest.mark.parametrize("bucket_mib", [25, 1e-4])
def test_law_5_one_gradient_all_reduce_a_window_and_law_7_in_the_gradients_own_memory(
    tmp_path: Path, bucket_mib: float
) -> None:
    for (first, second, third, during), buckets, in_place in on_ranks(2, tmp_path, counted, 4, bucket_mib):
        assert (buckets > 1) == (bucket_mib < 1)
        assert first <= buckets and second == third == buckets and not during
        assert in_place, "gradients live in the buckets, not beside them"
