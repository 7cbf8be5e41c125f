"""A window of text, whose samples have unequal numbers of bytes to guess, is still the larger batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from accumexp.accum import Window, data_parallel, map_tensors, rank_share, split, split_sizes, window_loss
from accumexp.data.text import IGNORED, VOCABULARY
from accumexp.training.metrics import Accuracy

from ..support.ranks import on_ranks
from ..support.reference import gradients, larger_batch_gradient, relative_error
from ..support.text import LENGTH, SAMPLES, STEPS, ragged


def small_bert() -> nn.Module:
    pytest.importorskip("transformers")
    from accumexp.models import Bert

    torch.manual_seed(2)
    return Bert(VOCABULARY, LENGTH, hidden=16).double()


def without_key_biases(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the biases of keys: they add the same to all of a query's scores, and have the gradient 0."""
    whole = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
    for name, value in gradient.items():
        assert not name.endswith("key.bias") or float(value.norm()) <= 1e-12 * whole
    return {name: value for name, value in gradient.items() if not name.endswith("key.bias")}


def larger_batch() -> dict[str, Tensor]:
    return without_key_biases(larger_batch_gradient(small_bert(), nn.CrossEntropyLoss(), *ragged()))


@pytest.mark.parametrize("steps", [*STEPS, SAMPLES])
def test_law_1_a_window_of_ragged_text_is_the_larger_batch(steps: int) -> None:
    model, (inputs, targets) = small_bert(), ragged()
    result = Window(model, nn.CrossEntropyLoss(), steps).backward(inputs, targets)
    assert relative_error(without_key_biases(gradients(model)), larger_batch()) <= 1e-12
    expected = nn.CrossEntropyLoss()(model(**inputs), targets).item()
    assert float(result.loss) == pytest.approx(expected, rel=1e-12)
    assert int(result.weight) == int((targets != IGNORED).sum()), "law 2: the window's own valid tokens"


def test_law_2_a_mean_of_means_is_another_gradient() -> None:
    """What the test above would say of the bug that it is there for."""
    inputs, targets = ragged()
    keep = (targets != IGNORED).any(1)  # the mean of no item is nan
    inputs, targets = {name: t[keep] for name, t in inputs.items()}, targets[keep]
    expected = without_key_biases(larger_batch_gradient(small_bert(), nn.CrossEntropyLoss(), inputs, targets))
    model, sizes = small_bert(), split_sizes(len(targets), 5)
    cut: Any = split(inputs, sizes)
    for inputs_k, targets_k in zip(cut, targets.split(sizes), strict=True):
        (nn.CrossEntropyLoss()(model(**inputs_k), targets_k) / 5).backward()
    assert relative_error(without_key_biases(gradients(model)), expected) > 1e-2


def test_padding_and_a_sample_without_a_byte_to_guess_weigh_nothing() -> None:
    inputs, targets = ragged()
    loss, model = window_loss(nn.CrossEntropyLoss()), small_bert()
    assert float(loss.weight(targets[5:6])) == 0
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 77)}
    for model_inputs in (inputs, other):
        model.zero_grad()
        Window(model, nn.CrossEntropyLoss(), 5).backward(model_inputs, targets)
        assert relative_error(without_key_biases(gradients(model)), larger_batch()) <= 1e-12
    model.zero_grad()
    nothing = Window(model, nn.CrossEntropyLoss(), 1).backward(
        {name: t[5:6] for name, t in inputs.items()}, targets[5:6]
    )
    assert float(nothing.loss) == 0 and all(not g.any() for g in gradients(model).values())


def on_a_rank() -> dict[int, tuple[dict[str, Tensor], float, float]]:
    """For every number of steps: this rank's gradient, loss and weight."""
    results = {}
    for steps in STEPS:
        model, (inputs, targets) = data_parallel(small_bert()), ragged()
        shares = rank_share(SAMPLES, steps, dist.get_rank(), dist.get_world_size())
        rows = [row for share in shares for row in share]
        window = Window(model, nn.CrossEntropyLoss(), steps)
        result = window.backward(map_tensors(lambda t, rows=rows: t[rows], inputs), targets[rows])
        gradient = {name: g.clone() for name, g in gradients(window.model).items()}
        results[steps] = (gradient, float(result.loss), float(result.weight))
    return results


@pytest.mark.parametrize("world", [1, 2])
def test_law_2_the_tokens_of_all_ranks_are_counted(tmp_path: Path, world: int) -> None:
    expected, (inputs, targets) = larger_batch(), ragged()
    loss = nn.CrossEntropyLoss()(small_bert()(**inputs), targets).item()
    for by_steps in on_ranks(world, tmp_path, on_a_rank):
        for steps, (gradient, value, weight) in by_steps.items():
            assert relative_error(without_key_biases(gradient), expected) <= 1e-12, steps
            assert value == pytest.approx(loss, rel=1e-12)
            assert weight == int((targets != IGNORED).sum())


class NoReads(TorchDispatchMode):
    """Fails where the host would read a tensor's values, and wait for a device to have them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [True, False])
def test_law_9_a_window_of_text_never_reads_a_value(padded: bool) -> None:
    model, (inputs, targets) = small_bert(), ragged()
    if not padded:
        inputs["attention_mask"].fill_(1)
    observe: Any = Accuracy().update
    with NoReads():
        Window(model, nn.CrossEntropyLoss(), 3).backward(inputs, targets, observe=observe)
