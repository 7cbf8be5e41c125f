"""What a recorded window and step work on, by a recorder that replays operators on the same memory."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from accumexp.accum import GraphedWindow, OptimizerStep, Window
from accumexp.accum.graph import FIRST, IN_A_ROW, GraphedStep
from accumexp.errors import UsageError
from accumexp.training import graph_check

from ..support.experiments import trainer_of
from ..support.reference import classification, gradients, larger_batch_gradient, relative_error, small_model
from ..support.tape import Tape

CRITERION = nn.CrossEntropyLoss()


def replayed(model: nn.Module, steps: int = 4) -> tuple[GraphedWindow, Tape]:
    tape = Tape()
    return GraphedWindow(Window(model, CRITERION, steps), tape), tape


def test_law_1_a_tape_of_a_window_has_the_larger_batchs_gradient() -> None:
    model = small_model()
    window, tape = replayed(model)
    for number, samples in enumerate((50, 50, 50, 13, 50, 13, 13, 50, 13)):
        inputs, targets = classification(samples)
        inputs = inputs + number
        model.zero_grad(set_to_none=False)
        loss = window.backward(inputs, targets).loss
        expected = larger_batch_gradient(model, CRITERION, inputs, targets)
        assert relative_error(gradients(model), expected) <= 1e-12
        assert loss.item() == pytest.approx(CRITERION(model(inputs), targets).item(), rel=1e-12)
    assert (tape.recorded, tape.replays) == (2, 9 - 2 * FIRST)


def test_gradients_that_are_set_to_none_are_never_those_of_a_replay() -> None:
    model = small_model()
    window, tape = replayed(model)
    inputs, targets = classification(8)
    expected = larger_batch_gradient(model, CRITERION, inputs, targets)
    for number in range(FIRST + IN_A_ROW + 2):
        model.zero_grad()
        if number == IN_A_ROW - 1:
            with pytest.warns(UserWarning, match="zero gradients in place"):
                window.backward(inputs, targets)
        else:
            window.backward(inputs, targets)
        assert relative_error(gradients(model), expected) <= 1e-12
    assert not tape.recorded
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        window.backward(inputs, targets)
        assert relative_error(gradients(model), expected) <= 1e-12
    assert (tape.recorded, tape.replays) == (1, 3)


def test_nothing_recorded_before_a_gradient_moved_is_replayed() -> None:
    model = small_model()
    window, tape = replayed(model)
    batches = {samples: classification(samples) for samples in (8, 12)}

    def made(samples: int) -> None:
        model.zero_grad(set_to_none=False)
        window.backward(*batches[samples])
        expected = larger_batch_gradient(model, CRITERION, *batches[samples])
        assert relative_error(gradients(model), expected) <= 1e-12, samples

    for samples in (8, 8, 8, 12, 12):
        made(samples)
    assert tape.recorded == 1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for samples in (12, 12, 8, 8):
        made(samples)
    assert tape.recorded == 3


class Averaging(nn.Module):
    """A running mean that every forward replaces by another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = small_model()
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * inputs.mean()
        return self.layer(inputs)


def test_a_forward_that_replaces_a_buffer_is_refused_and_the_buffer_stays() -> None:
    model = Averaging()
    window, _ = replayed(model, 1)
    inputs, targets = classification(8)
    for _ in range(FIRST):
        model.zero_grad(set_to_none=False)
        window.backward(inputs, targets)
    mean, value = model.mean, model.mean.item()
    with pytest.raises(RuntimeError, match="a forward pass replaces a buffer"):
        window.backward(inputs, targets)
    assert model.mean is mean and mean.item() == value


def test_a_module_that_changes_its_mode_is_not_replayed_in_the_old_one() -> None:
    norm = nn.BatchNorm1d(9)
    model = nn.Sequential(nn.Linear(6, 9), norm, nn.Linear(9, 5)).double()
    window, tape = replayed(model, 1)
    inputs, targets = classification(16)
    for mode in (True, True, True, False, False, False, True, True, True):
        norm.train(mode)
        plain = copy.deepcopy(model)
        plain.zero_grad()
        CRITERION(plain(inputs), targets).backward()
        model.zero_grad(set_to_none=False)
        window.backward(inputs, targets)
        assert relative_error(gradients(model), gradients(plain)) <= 1e-12
        buffers, expected = ({n: b.double() for n, b in m.named_buffers()} for m in (model, plain))
        assert relative_error(buffers, expected) <= 1e-12
    assert tape.recorded == 3


class Dropping(nn.Module):
    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1024, 10), nn.Linear(1024, 10)])
        self.draw = draw

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.flatten(1)
        return self.layers[0](inputs) if self.draw() < 0.5 else self.layers[1](inputs)


def test_a_model_that_draws_on_the_host_is_refused() -> None:
    trainer, _ = trainer_of("data.batch_size=100", "accum.steps=2")
    drawn = random.getstate()
    window = Window(Dropping(random.random).double(), CRITERION, 2)
    with pytest.raises(UsageError, match="Dropping draws random numbers on the host"):
        graph_check.checked_recorder(window, trainer.splits.train, Tape)
    assert random.getstate() == drawn
    window = Window(Dropping(lambda: 1.0).double(), CRITERION, 2)
    assert isinstance(graph_check.checked_recorder(window, trainer.splits.train, Tape), Tape)


@pytest.mark.parametrize("change", ["rolled back", "state", "rate"])
def test_a_step_is_recorded_anew_for_another_state_or_rate(change: str) -> None:
    inputs, targets = classification(8)
    inputs = inputs.float()

    def run(graphed: bool) -> dict[str, Tensor]:
        model, tape = small_model().float(), Tape()
        optimizer = torch.optim.SGD(model.parameters(), torch.tensor(0.5), momentum=0.9, fused=True)
        plain = Window(model, CRITERION, 2)
        step = OptimizerStep(plain, optimizer)
        window: Any = GraphedWindow(plain, tape) if graphed else plain
        steps: Any = GraphedStep(step, tape) if graphed else step
        kept: Any = None
        for update in range(12):
            if update == 5:
                kept = copy.deepcopy(optimizer.state_dict())
            if update == 8 and change == "rolled back":
                optimizer.load_state_dict(kept)
            if update == 8 and change == "state":
                optimizer.state = defaultdict(dict)
            if update == 8 and change == "rate":
                optimizer.param_groups[0]["lr"] = torch.tensor(0.125)
            optimizer.zero_grad(set_to_none=False)
            window.backward(inputs, targets)
            steps()
        assert not graphed or tape.replays > 10
        return {name: value.detach() for name, value in model.named_parameters()}

    assert relative_error(run(True), run(False)) <= 1e-6


class Outputs(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Telling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = small_model()

    def forward(self, inputs: Tensor) -> Outputs:
        return Outputs(self.layer(inputs), inputs.sum(1))


def test_what_is_observed_of_a_replay_has_its_type_and_stays() -> None:
    model, seen = Telling(), []
    window = GraphedWindow(
        Window(model, lambda outputs, targets: CRITERION(outputs.logits, targets), 2), Tape()
    )
    for number in range(FIRST + 2):
        inputs, targets = classification(8)
        model.zero_grad(set_to_none=False)
        window.backward(inputs + number, targets, observe=lambda outputs, _: seen.append(outputs))
    assert all(type(outputs) is Outputs for outputs in seen) and len(seen) == 2 * (FIRST + 2)
    for number in range(FIRST + 2):
        hidden = torch.cat([outputs.hidden for outputs in seen[2 * number : 2 * number + 2]])
        assert torch.equal(hidden, (classification(8)[0] + number).sum(1))
