"""Law: an input example in JSON is the sample's own numbers, bit for bit, in as few digits as they need."""

from __future__ import annotations

import json

import pytest
import torch

from accumexp.tracking.model_inputs import described_inputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_an_example_is_read_back_bit_for_bit(dtype: torch.dtype) -> None:
    inputs = (torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    written = json.dumps(described_inputs(inputs, None)["example"])
    assert torch.equal(torch.tensor(json.loads(written), dtype=dtype), inputs[:1])


def test_a_number_has_the_digits_of_its_type() -> None:
    inputs = {"x": torch.tensor([[0.1, 1e-30]]), "n": torch.tensor([3])}
    assert json.dumps(described_inputs(inputs, None)["example"]) == '{"x": [[0.1, 1e-30]], "n": [3]}'
