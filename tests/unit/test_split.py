"""How a batch is cut, and how many micro-batches a window has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accumexp.accum import batch_size, split, split_sizes, steps_for, tensors
from accumexp.config.sizes import batch_sizes
from accumexp.errors import UsageError


@given(samples=st.integers(1, 10_000), data=st.data())
def test_sizes_differ_by_one_at_most_and_lose_nothing(samples: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, samples))
    sizes = split_sizes(samples, steps)
    assert sum(sizes) == samples and len(sizes) == steps
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    assert sizes == sorted(sizes, reverse=True)


@given(full=st.integers(1, 2_000), data=st.data())
def test_law_3_a_smaller_window_keeps_the_micro_batchs_size(full: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, full))
    samples = data.draw(st.integers(1, full))
    assert steps_for(full, full, steps) == steps
    fewer = steps_for(samples, full, steps)
    assert 1 <= fewer <= min(steps, samples)
    assert max(split_sizes(samples, fewer)) <= max(split_sizes(full, steps))


def test_nested_batches_are_cut_alike_and_without_copies() -> None:
    batch = {"a": torch.arange(10), "b": (torch.rand(10, 3), [torch.rand(10)])}
    pieces = split(batch, [4, 3, 3])
    assert [batch_size(piece) for piece in pieces] == [4, 3, 3]
    rebuilt = [torch.cat(column) for column in zip(*(tensors(piece) for piece in pieces), strict=True)]
    for joined, whole, piece in zip(rebuilt, tensors(batch), tensors(pieces[0]), strict=True):
        assert torch.equal(joined, whole)
        assert piece.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_what_is_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="no tensor"):
        batch_size([])
    with pytest.raises(ValueError, match="not str"):
        batch_size({"x": "text"})  # pyright: ignore[reportArgumentType]


@given(batch=st.integers(1, 4096), data=st.data())
def test_any_two_of_the_three_sizes_give_the_third(batch: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, batch))
    filled = batch_sizes(batch, steps, None)
    assert filled == (batch, steps, -(-batch // steps))
    assert batch_sizes(*filled) == filled, "a checkpoint holds all three"
    from_micro = batch_sizes(batch, None, steps)
    assert batch_sizes(*from_micro) == from_micro
    assert from_micro[2] is not None and from_micro[2] <= steps
    assert batch_sizes(None, steps, batch) == (steps * batch, steps, batch)


def test_sizes_left_out_have_their_defaults() -> None:
    assert batch_sizes(None, None, None) == (128, 1, 128)
    assert batch_sizes(None, 4, None) == (128, 4, 32)
    assert batch_sizes(None, None, 32) == (128, 4, 32)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ((128, 0, None), "accum.steps=0"),
        ((0, None, None), "data.batch_size=0"),
        ((None, None, -3), "accum.micro_batch_size=-3"),
        ((4, 8, None), "accum.steps=8"),
        ((128, 4, 16), "accum.micro_batch_size=16"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(
    sizes: tuple[int | None, int | None, int | None], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        batch_sizes(*sizes)
