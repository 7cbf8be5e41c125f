"""The window over a stack of models: each model is a part of it, with its own weights and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from accumexp.accum import Window
from accumexp.accum.replica_window import ReplicaWindow
from accumexp.training.checkpoint import save

from ..support.reference import classification, small_model


def test_a_model_in_a_stack_is_a_model_and_its_checkpoint_holds_it_alone(tmp_path: Path) -> None:
    models = [nn.Linear(50, 40, dtype=torch.float64) for _ in range(8)]
    before = [model.weight.detach().clone() for model in models]
    joint = ReplicaWindow([Window(model, nn.CrossEntropyLoss(), 2) for model in models])
    assert all(map(torch.equal, before, (model.weight for model in models)))
    joint.parameters[0].detach()[3] = 7.0
    assert models[3].weight.eq(7).all() and not models[2].weight.eq(7).any()
    save(tmp_path / "one.pt", {"model": models[3].state_dict()})
    assert (tmp_path / "one.pt").stat().st_size < 2 * 50 * 40 * 8
    joint.keep([0, 5])
    joint.parameters[0].detach()[1] = 9.0
    assert models[5].weight.eq(9).all() and models[3].weight.eq(7).all()


def test_a_gradient_that_other_hands_have_cleared_is_seen_again() -> None:
    models = [nn.Linear(6, 3) for _ in range(2)]
    joint = ReplicaWindow([Window(model, nn.CrossEntropyLoss(), 1) for model in models])
    inputs, targets = torch.randn(2, 5, 6), torch.randint(0, 3, (2, 5))
    joint.backward(inputs, targets, steps=1)
    models[1].zero_grad()
    joint.backward(inputs, targets, steps=2)
    alone = torch.autograd.grad(nn.CrossEntropyLoss()(models[1](inputs[1]), targets[1]), models[1].weight)[0]
    assert models[1].weight.grad is not None
    assert torch.allclose(models[1].weight.grad, alone, atol=1e-6)


def test_a_parameter_that_a_window_does_not_use_has_no_gradient_in_it() -> None:
    class Switched(nn.Linear):
        on = True

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) if self.on else input[:, :3] * self.weight.sum()

    models = [Switched(6, 3) for _ in range(2)]
    joint = ReplicaWindow([Window(model, nn.CrossEntropyLoss(), 1) for model in models])
    batch = torch.randn(2, 5, 6), torch.randint(0, 3, (2, 5))
    for on in (True, False, True):
        for model in models:
            model.on = on
        joint.backward(*batch, steps=1)
        assert [p.grad is not None for p in (*joint.parameters, models[1].bias)] == [True, on, on]


def test_what_a_callback_freezes_is_frozen_in_all_replicas() -> None:
    windows = [Window(small_model(seed=seed), nn.CrossEntropyLoss(), 2) for seed in (1, 2)]
    joint = ReplicaWindow(windows)
    inputs, targets = classification(8)
    batches = torch.stack([inputs, inputs]), torch.stack([targets, targets])
    for window in windows:
        next(window.model.parameters()).requires_grad_(False)
    joint.backward(*batches, steps=2)
    for window in windows:
        first, *others = window.model.parameters()
        assert first.grad is None and all(p.grad is not None for p in others)
    next(windows[0].model.parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match="frozen in some replicas"):
        joint.backward(*batches, steps=2)
