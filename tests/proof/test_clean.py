"""Random right configurations are all proved."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ..support.ranks import on_ranks
from . import clean_loops
from .clean_loops import Configuration, alarm, certified, configuration, numbered

# Configurations that once failed, and why; `numbered` never changes.
ONCE_WRONG = {
    0: "class weights in bf16",
    11: 'reduction="none" counted ignored targets',
    12: "clipping in bf16 rounds again",
    14: "clipping in fp32 rounds the norm",
    57: "clipping in bf16 rounds the norm",
    269: "the parts' rounding held against the norm before clipping",
    364: "clipping one sample's gradient in fp64",
    452: "the larger batch diverges",
    300876: "the window after an overflow overflows by itself",
}


@st.composite
def configurations(draw: st.DrawFn) -> Configuration:
    return configuration(lambda options: draw(st.sampled_from(options)))


@settings(max_examples=settings().max_examples // 4)
@given(configurations())
def test_right_windows_are_proved(config: Configuration) -> None:
    assert alarm(config, certified(config, updates=4)) == ""


@pytest.mark.parametrize("number", ONCE_WRONG, ids=lambda number: ONCE_WRONG[number])
def test_right_windows_that_were_once_called_wrong(number: int) -> None:
    config = numbered(number)
    assert alarm(config, certified(config)) == ""


@pytest.mark.slow
def test_right_windows_of_two_ranks_are_proved(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path, clean_loops.numbers, 0, 6) == [[], []]
