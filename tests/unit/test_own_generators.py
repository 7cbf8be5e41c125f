"""Law 8 for samplers and streams that draw from a generator of their own; inputs that are dicts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from accumexp.accum import tensors
from accumexp.config.schema import DataConfig
from accumexp.data import Placement, build_splits
from accumexp.data.samples import Layout
from accumexp.data.user_sampler import SamplerOrder

ODD = "tests.support.odd_parts"
CPU = Placement(torch.device("cpu"), torch.float64)


def test_an_input_that_is_a_dict_keeps_its_name() -> None:
    sample = {"parts": {"a": torch.ones(2), "b": torch.zeros(2)}, "label": 1}
    layout = Layout(target="label")
    inputs, target = layout.separate(sample, "data.train")
    assert list(inputs) == ["parts"] and list(inputs["parts"]) == ["a", "b"] and target == 1
    doubled = layout.with_inputs(
        sample, lambda inputs: {"parts": {"a": 2 * inputs["parts"]["a"]}}, "data.train"
    )
    assert doubled["parts"]["a"].tolist() == [2, 2] and doubled["label"] == 1


def order() -> SamplerOrder:
    return SamplerOrder({"_target_": f"{ODD}.OwnSampler"}, TensorDataset(torch.ones(9)), torch.arange(9))


def test_law_8_a_samplers_own_generator_begins_every_epoch_anew() -> None:
    one = order()
    first = one.positions(9, 0, 0).tolist()
    one.positions(9, 0, 1)
    assert one.positions(9, 0, 0).tolist() == first == order().positions(9, 0, 0).tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_law_8_so_does_a_streams(workers: int) -> None:
    node = {"_target_": f"{ODD}.OwnStream"}
    config = DataConfig(train=node, test=node, num_classes=3, batch_size=16, workers=workers)
    train = build_splits(config, 0, CPU).train
    first, second = ([tensors(batch.inputs)[0] for batch in train.epoch(epoch)] for epoch in (0, 1))
    assert len(first) == 4 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
