"""What a window that ran out of memory has changed goes back: buffers, gradients, what was observed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from accumexp.accum import LossScale, OptimizerStep, OutOfMemory, Recovery, Window, measure_activations

from ..support.reference import classification, gradients, relative_error
from ..support.short import SAMPLES, WORDS, Short, stateful, stateless


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
