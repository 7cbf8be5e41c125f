"""Out of memory in a window: the update is the one of the finer split, and counted once."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from accumexp.accum import OutOfMemory, Recovery, Window, is_out_of_memory

from ..support.reference import classification, gradients, larger_batch_gradient, relative_error
from ..support.short import SAMPLES, STEPS, WORDS, Short, differing, left_behind, stateful, stateless

PLACES = [(where, k) for where in ("forward", "backward") for k in range(STEPS)]


def undisturbed(model: nn.Module, steps: int, batches: int = 1) -> dict[str, Any]:
    """What windows of `steps` leave behind, without any recovery."""
    begin()
    for _ in range(batches):
        model.zero_grad()
        Window(model, nn.CrossEntropyLoss(), steps).backward(*classification(SAMPLES))
    return left_behind(model)


def begin() -> None:
    torch.manual_seed(11)
    random.seed(11)


@pytest.mark.parametrize(("where", "k"), PLACES)
def test_out_of_memory_in_any_micro_batch_gives_the_finer_windows_bits(where: str, k: int) -> None:
    expected = undisturbed(stateful(Short()), 2 * STEPS)
    short = Short({k}, where)
    model = stateful(short)
    begin()
    events: list[OutOfMemory] = []
    recovery = Recovery(Window(model, nn.CrossEntropyLoss(), STEPS), events.append)
    result = recovery.backward(*classification(SAMPLES))
    assert not differing(left_behind(model), expected)
    assert (result.samples, result.steps, float(result.weight)) == (SAMPLES, 2 * STEPS, SAMPLES)
    assert events == [OutOfMemory(rank=0, micro_batch=k, steps=STEPS, at_most=4)]
    assert short.calls == k + 1 + 2 * STEPS


@pytest.mark.parametrize(("where", "k"), PLACES)
def test_law_1_the_update_after_out_of_memory_is_the_larger_batchs(where: str, k: int) -> None:
    batch = classification(SAMPLES)
    expected = larger_batch_gradient(stateless(Short()), nn.CrossEntropyLoss(), *batch)
    loss = nn.functional.cross_entropy(stateless(Short())(batch[0]), batch[1]).item()
    model = stateless(Short({k}, where))
    result = Recovery(Window(model, nn.CrossEntropyLoss(), STEPS)).backward(*batch)
    assert relative_error(gradients(model), expected) <= 1e-12
    assert float(result.loss) == pytest.approx(loss, rel=1e-13)


def test_without_trouble_it_is_the_window_itself() -> None:
    expected = undisturbed(stateful(Short()), STEPS, batches=2)
    model = stateful(Short())
    recovery = Recovery(Window(model, nn.CrossEntropyLoss(), STEPS))
    begin()
    for _ in range(2):
        model.zero_grad()
        assert recovery.backward(*classification(SAMPLES)).steps == STEPS
    assert not differing(left_behind(model), expected)
    assert recovery.at_most is None


def test_a_split_that_still_is_too_coarse_is_split_again_and_remembered() -> None:
    model = stateful(Short({3, 5}, "backward"))
    events: list[OutOfMemory] = []
    recovery = Recovery(Window(model, nn.CrossEntropyLoss(), 4), events.append)
    begin()
    assert recovery.backward(*classification(SAMPLES)).steps == 16
    assert events == [OutOfMemory(0, 3, 4, 8), OutOfMemory(0, 1, 8, 4)]
    assert not differing(left_behind(model), undisturbed(stateful(Short()), 16))


def test_later_windows_are_split_as_fine_and_no_coarser_than_was_asked() -> None:
    model = stateless(Short({3, 5}))
    recovery = Recovery(Window(model, nn.CrossEntropyLoss(), 4))
    recovery.backward(*classification(SAMPLES))
    for samples, asked, made in [(SAMPLES, 4, 16), (SAMPLES, 32, 32), (7, 1, 2), (3, 1, 1), (3, 3, 3)]:
        model.zero_grad()
        assert recovery.backward(*classification(samples), steps=asked).steps == made


def test_a_ragged_window_is_cut_to_micro_batches_that_shrink() -> None:
    for samples, steps, made in [(7, 2, 4), (5, 1, 2), (3, 2, 3), (2, 1, 2), (61, 7, 13)]:
        model = stateless(Short({steps - 1}))
        recovery = Recovery(Window(model, nn.CrossEntropyLoss(), steps))
        assert recovery.backward(*classification(samples)).steps == made
        expected = larger_batch_gradient(stateless(Short()), nn.CrossEntropyLoss(), *classification(samples))
        assert relative_error(gradients(model), expected) <= 1e-12


def test_one_sample_that_is_too_large_ends_in_one_line() -> None:
    model = stateful(Short(range(100)))
    recovery = Recovery(Window(model.eval(), nn.CrossEntropyLoss(), 1))
    with pytest.raises(torch.OutOfMemoryError, match=f"one sample in a micro-batch.* rank 0: {WORDS}"):
        recovery.backward(*classification(4))
    assert not gradients(model)


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ValueError("can't allocate memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_nothing_else_is_taken_for_out_of_memory(error: BaseException, short: bool) -> None:
    assert is_out_of_memory(error) == short
    model = stateful(Short({2}, "forward", error))
    recovery = Recovery(Window(model, nn.CrossEntropyLoss(), 4))
    if short:
        assert recovery.backward(*classification(SAMPLES)).steps == 8
        return
    with pytest.raises(type(error)):
        recovery.backward(*classification(SAMPLES))
    assert recovery.at_most is None


def test_a_sum_of_means_is_not_made_again_in_more_of_them() -> None:
    with pytest.raises(ValueError, match="sum of micro-batch means grows"):
        Recovery(Window(stateless(Short()), nn.CrossEntropyLoss(), 2, reduction="sum"))


def test_an_error_that_is_its_own_cause_is_let_go() -> None:
    error = torch.OutOfMemoryError(WORDS)
    error.__cause__ = error
    recovery = Recovery(Window(stateless(Short({1}, "forward", error)), nn.CrossEntropyLoss(), 2))
    assert recovery.backward(*classification(SAMPLES)).steps == 4


REAL = """
import resource, torch
from torch import nn
from accumexp.accum import Recovery, Window
torch.set_num_threads(1)

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, inputs):  # 4 MiB a sample, three times
        return (inputs @ self.scale[:, None]).expand(-1, 2**20).exp().sin().exp().mean(1, keepdim=True)

torch.manual_seed(0)
inputs, targets = torch.rand(64, 8), torch.rand(64, 1)
model = Wide()
Window(model, nn.MSELoss(), 64).backward(inputs, targets)
model.scale.grad = None
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 400 * 2**20, resource.RLIM_INFINITY))
found = []
result = Recovery(Window(model, nn.MSELoss(), 1), found.append).backward(inputs, targets)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
gradient, model.scale.grad = model.scale.grad, None
Window(model, nn.MSELoss(), result.steps).backward(inputs, targets)
print(result.steps, len(found), torch.equal(gradient, model.scale.grad))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space as Linux does")
def test_with_real_memory_on_the_cpu() -> None:
    """768 MiB of activations in one micro-batch, and 400 MiB to have."""
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps, times, right = done.stdout.split()
    assert int(steps) >= 4 and int(steps) == 2 ** int(times) and right == "True"
