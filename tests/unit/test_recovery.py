"""Out of memory in a window: the update is the one of the finer split, on all ranks, and counted once."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accumexp.accum import (
    LossScale,
    OptimizerStep,
    OutOfMemory,
    Recovery,
    Window,
    is_out_of_memory,
    measure_activations,
)

from ..support.reference import classification, gradients, larger_batch_gradient, relative_error
from ..support.short import WORDS, Short, differing, left_behind, stateful, stateless

SAMPLES, STEPS = 64, 8
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


def test_gradients_that_were_there_before_are_not_thrown_away() -> None:
    model = stateful(Short({4 + 2}))
    recovery = Recovery(Window(model, nn.CrossEntropyLoss(), 4))
    recovery.backward(*classification(SAMPLES))
    with pytest.raises(torch.OutOfMemoryError, match=WORDS) as raised:
        recovery.backward(*classification(SAMPLES))
    assert "gradients before this window" in raised.value.__notes__[0]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_failed_is_freed_before_the_window_begins_again(where: str) -> None:
    short = Short({1, 7}, where)
    model = stateful(short)
    freed: list[list[bool]] = []

    def look(_: OutOfMemory) -> None:
        freed.append([seen() is None for seen in short.seen])
        assert not gradients(model), "none, and not zeros"

    for _ in range(2):  # the second time there are kept buffers
        model.zero_grad()
        Recovery(Window(model, nn.CrossEntropyLoss(), 2), look).backward(*classification(SAMPLES))
    assert freed == [[True, True], [True] * 4]
    assert all(p.grad is not None for p in model.parameters())


def test_it_keeps_no_copy_of_the_gradients() -> None:
    """Law 7."""
    model = nn.Sequential(nn.Linear(37, 41, bias=False))
    recovery = Recovery(Window(model, nn.MSELoss(), 4))
    recovery.backward(torch.randn(8, 37), torch.randn(8, 41))
    assert not [t for t in vars(recovery._start).values() if isinstance(t, Tensor) and t.shape == (41, 37)]
    assert recovery._start._copies == []


class Moving(nn.Module):
    """A buffer that a forward replaces by another tensor, and one that it changes."""

    def __init__(self, short: Short) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5).double()
        self.short = short
        self.replaced: Tensor
        self.changed: Tensor
        self.register_buffer("replaced", torch.zeros((), dtype=torch.float64))
        self.register_buffer("changed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("absent", None)
        self.absent: Tensor | None
        self.register_buffer("first", None)
        self.first: Tensor | None

    def forward(self, inputs: Tensor) -> Tensor:
        self.replaced = self.replaced * 0.5 + inputs.mean()
        self.changed += 1
        self.first = inputs[0].clone() if self.first is None else self.first + 1
        return self.short(self.layer(inputs))


class Remembering(nn.Module):
    """A buffer that is part of the graph that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5).double()
        self.hidden: Tensor
        self.register_buffer("hidden", torch.zeros(5, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.layer(inputs)
        self.hidden = outputs.mean(0)
        return outputs


def test_a_copy_of_a_buffer_is_part_of_no_graph() -> None:
    recovery = Recovery(Window(Remembering(), nn.CrossEntropyLoss(), 2))
    for _ in range(2):
        recovery.backward(*classification(SAMPLES))
    recovery._start.save()
    assert [kept.requires_grad for kept in recovery._start._copies] == [False]


def test_buffers_that_are_not_made_yet_are_no_hindrance() -> None:
    def made() -> nn.Module:  # what is not made yet cannot be copied
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.LazyBatchNorm1d()).double()

    model, plain = made(), made()
    recovery = Recovery(Window(model, nn.CrossEntropyLoss(), 2))
    window = Window(plain, nn.CrossEntropyLoss(), 2)
    for _ in range(2):
        recovery.backward(*classification(SAMPLES))
        window.backward(*classification(SAMPLES))
    assert all(
        torch.equal(buffer, expected)
        for buffer, expected in zip(model.buffers(), plain.buffers(), strict=True)
    )
    assert not relative_error(gradients(model), gradients(plain))


def test_a_buffer_that_was_replaced_goes_back_too() -> None:
    torch.manual_seed(0)
    model = Moving(Short({2, 3 + 8 + 5}))
    plain = copy.deepcopy(model)
    plain.short.at = set()
    recovery = Recovery(Window(model, nn.CrossEntropyLoss(), 4))
    window = Window(plain, nn.CrossEntropyLoss(), 4)
    for steps in (8, 16):
        model.zero_grad()
        plain.zero_grad()
        recovery.backward(*classification(SAMPLES))
        window.backward(*classification(SAMPLES), steps=steps)
        assert int(model.changed) == int(plain.changed)
        assert torch.equal(model.replaced, plain.replaced) and model.absent is None
        assert model.first is not None and plain.first is not None
        assert torch.equal(model.first, plain.first)


def test_a_sum_of_means_is_not_made_again_in_more_of_them() -> None:
    with pytest.raises(ValueError, match="sum of micro-batch means grows"):
        Recovery(Window(stateless(Short()), nn.CrossEntropyLoss(), 2, reduction="sum"))


def test_an_error_that_is_its_own_cause_is_let_go() -> None:
    error = torch.OutOfMemoryError(WORDS)
    error.__cause__ = error
    recovery = Recovery(Window(stateless(Short({1}, "forward", error)), nn.CrossEntropyLoss(), 2))
    assert recovery.backward(*classification(SAMPLES)).steps == 4


def test_the_room_to_go_back_is_taken_before_any_window() -> None:
    recovery = Recovery(Window(stateful(Short()), nn.CrossEntropyLoss(), 2))
    before = [kept.data_ptr() for kept in recovery._start._copies]
    recovery.backward(*classification(SAMPLES))
    assert before and before == [kept.data_ptr() for kept in recovery._start._copies]


def test_what_was_seen_of_a_window_that_failed_is_forgotten() -> None:
    model, batch = stateless(Short({2})), classification(SAMPLES)
    window = Window(model, nn.CrossEntropyLoss(), 4)
    observed: list[int] = []
    after: list[int] = []
    window.after_micro_batch.append(lambda micro: after.append(micro.number))
    window.on_discard += [observed.clear, after.clear]
    Recovery(window).backward(*batch, observe=lambda outputs, targets: observed.append(len(targets)))
    assert observed == [8] * 8 and after == list(range(8))


def test_saved_activations_are_those_of_the_window_that_was_made() -> None:
    peaks = []
    for short, steps in ((Short({0}, "backward"), 4), (Short(), 8)):
        model, batch = stateless(short), classification(SAMPLES)
        window = Window(model, nn.CrossEntropyLoss(), steps)
        with measure_activations(model, batch) as saved:
            window.on_discard.append(saved.start_anew)
            Recovery(window).backward(*batch)
        peaks.append(saved.peak_bytes)
    assert peaks[0] == peaks[1] > 0


def test_fp32_buffers_begin_anew() -> None:
    grads = []
    for short, steps in ((Short({3}), 4), (Short(), 8)):
        model = stateless(short).bfloat16()
        inputs, targets = classification(SAMPLES)
        window = Window(model, nn.CrossEntropyLoss(), steps, fp32_buffers=True)
        Recovery(window).backward(inputs.bfloat16(), targets)
        grads.append(gradients(model))
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[1])


@pytest.mark.parametrize("k", [0, 3])
def test_one_optimizer_step_and_the_loss_scale_moves_once(k: int) -> None:
    runs = []
    for short, steps in ((Short({k, 9 + k}, "backward"), 4), (Short(), 8)):
        model = stateless(short)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        stepped: list[int] = []
        optimizer.register_step_post_hook(lambda *_, stepped=stepped: stepped.append(1))
        scale = LossScale(2.0**4, growth_interval=2)
        window = Window(model, nn.CrossEntropyLoss(), steps, loss_scale=scale)
        step, recovery = OptimizerStep(window, optimizer, clip_norm=0.1), Recovery(window)
        for _ in range(3):
            optimizer.zero_grad()
            recovery.backward(*classification(SAMPLES), steps=steps)
            step()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        runs.append((weights, len(stepped), float(scale.scale), int(scale.good)))
    assert runs[0][1:] == runs[1][1:] == (3, 2.0**5, 1)


def test_the_state_is_what_a_resumed_run_needs() -> None:
    first, second = (
        Recovery(Window(stateful(Short({0})), nn.CrossEntropyLoss(), 4)),
        Recovery(Window(stateful(Short()), nn.CrossEntropyLoss(), 4)),
    )
    first.backward(*classification(SAMPLES))
    second.load_state_dict(first.state_dict())
    assert second.backward(*classification(SAMPLES)).steps == 8


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
