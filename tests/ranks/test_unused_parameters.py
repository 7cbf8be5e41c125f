"""A branch that some updates do not use: under ddp and in one process the larger batch's update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accumexp.accum import OptimizerStep, Recovery, Window, data_parallel
from accumexp.accum.sync import unused_parameters

from ..support.ranks import on_ranks

UPDATES = 6
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
}


class Branch(nn.Module):
    """Uses `extra` for the samples whose first number is above 1."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(4, 3)
        self.extra = nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, chosen = self.always(inputs), (inputs[:, 0] > 1).nonzero()[:, 0]
        return outputs.index_add(0, chosen, self.extra(inputs[chosen])) if len(chosen) else outputs


def batches() -> list[tuple[Tensor, Tensor]]:
    """Of 8 samples; the branch is used in the updates 1 and 3, there by one sample of the second rank."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(UPDATES, 8, 4, dtype=torch.float64, generator=generator)
    inputs[1, 5, 0] = inputs[3, 7, 0] = 2.0
    targets = torch.randint(0, 3, (UPDATES, 8), generator=generator)
    return list(zip(inputs, targets, strict=True))


def model() -> Branch:
    torch.manual_seed(0)
    return Branch().double()


def larger_batch(optimizer: str) -> dict[str, Tensor]:
    """Plain torch, the whole batch at once."""
    reference = model()
    stepped = OPTIMIZERS[optimizer.replace("fused", "momentum")](list(reference.parameters()))
    for inputs, targets in batches():
        stepped.zero_grad()
        nn.functional.cross_entropy(reference(inputs), targets).backward()
        stepped.step()
    return {name: value.clone() for name, value in reference.state_dict().items()}


def accumulated(
    optimizer: str,
    rank: int = 0,
    ranks: int = 1,
    recover: bool = False,
    search: bool = True,
    fp32_buffers: bool = False,
) -> dict[str, Tensor]:
    network: Any = model()
    wrapped = data_parallel(network, find_unused_parameters=search) if ranks > 1 else network
    window = Window(wrapped, nn.CrossEntropyLoss(), 2, fp32_buffers=fp32_buffers)
    stepped = OPTIMIZERS[optimizer](list(network.parameters()))
    step, share = OptimizerStep(window, stepped), 8 // ranks
    backward = Recovery(window).backward if recover else window.backward
    for inputs, targets in batches():
        stepped.zero_grad(set_to_none=not window.sync.keeps_gradients)
        share_here = slice(rank * share, (rank + 1) * share)
        backward(inputs[share_here], targets[share_here])
        step()
    return {name: value.clone() for name, value in network.state_dict().items()}


def worst(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_law_1_one_process_skips_a_parameter_that_the_larger_batch_does_not_use(optimizer: str) -> None:
    assert worst(accumulated(optimizer), larger_batch(optimizer)) <= 1e-12


# How the ranks reduce their gradients; only the first two search the graph, as DDP does.
WAYS: list[dict[str, Any]] = [
    {},
    {"recover": True},
    {"recover": True, "search": False},
    {"search": False, "fp32_buffers": True},
    {"recover": True, "search": False, "fp32_buffers": True},
]


def _on_rank() -> list[dict[str, Tensor]]:
    rank = torch.distributed.get_rank()
    return [accumulated(name, rank, 2, **way) for name in OPTIMIZERS for way in WAYS]


def test_law_1_so_do_all_ranks(tmp_path: Path) -> None:
    expected = [larger_batch(name) for name in OPTIMIZERS for _ in WAYS]
    for results in on_ranks(2, tmp_path, _on_rank):
        for one, other in zip(results, expected, strict=True):
            assert worst(one, other) <= 1e-12


def _without_looking() -> list[str]:
    window = Window(data_parallel(model()), nn.CrossEntropyLoss(), 2)
    try:
        for inputs, targets in batches()[::2]:  # the second window waits for what the first left out
            window.backward(inputs[:4], targets[:4])
    except RuntimeError as error:
        return unused_parameters(error, window.model)
    return []


def test_an_unused_parameter_that_ddp_waits_for_is_named(tmp_path: Path) -> None:
    for names in on_ranks(2, tmp_path, _without_looking):
        assert names == ["extra.weight", "extra.bias"]


def frozen_and_unfrozen(rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    """`extra` begins to train in update 2, and `always.bias` ceases to in update 4."""
    network: Any = model()
    network.extra.requires_grad_(False)
    wrapped = data_parallel(network) if ranks > 1 else network
    window = Window(wrapped, nn.CrossEntropyLoss(), 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    backward = Recovery(window).backward if ranks > 1 else window.backward
    share = 8 // ranks
    for update, (inputs, targets) in enumerate(batches()):
        network.extra.requires_grad_(update >= 2)
        network.always.bias.requires_grad_(update < 4)
        optimizer.zero_grad(set_to_none=not window.sync.keeps_gradients)
        share_here = slice(rank * share, (rank + 1) * share)
        backward(inputs[share_here], targets[share_here])
        if ranks == 1 and update >= 4:
            assert network.always.bias.grad is None
        optimizer.step()
    return {name: value.clone() for name, value in network.state_dict().items()}


def _frozen_on_rank() -> dict[str, Tensor]:
    return frozen_and_unfrozen(torch.distributed.get_rank(), 2)


def test_law_1_ranks_follow_what_is_frozen_and_unfrozen(tmp_path: Path) -> None:
    expected = frozen_and_unfrozen()
    for result in on_ranks(2, tmp_path, _frozen_on_rank):
        assert worst(result, expected) <= 1e-12


def _frozen_without_recovery() -> str:
    network = model()
    window = Window(data_parallel(network), nn.CrossEntropyLoss(), 2)
    network.always.bias.requires_grad_(False)
    try:
        window.backward(*(part[:4] for part in batches()[1]))
    except RuntimeError as error:
        return str(error)
    return ""


def test_ddp_says_what_it_cannot_follow(tmp_path: Path) -> None:
    for message in on_ranks(2, tmp_path, _frozen_without_recovery):
        assert message.startswith("a parameter was frozen or unfrozen")
