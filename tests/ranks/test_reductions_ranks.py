"""Law 5: gradients are reduced over ranks once a window, in its last micro-batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from accumexp.accum import Window, data_parallel

from ..support.ranks import on_ranks
from ..support.reference import classification, larger_batch_gradient, relative_error, small_model
from .windows import SAMPLES, own_part, whole_gradients


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
