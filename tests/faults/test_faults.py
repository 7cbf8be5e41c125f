"""A few of the faults of `python -m tests.faults`, for the slow lane."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .disks import full_disks
from .kills import random_kills, reference, tried
from .outages import LONG, outages

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("count", "ranks"), [(5, False), (1, True)])
def test_law_8_a_run_that_is_killed_anywhere_goes_on_to_the_same_bits(
    tmp_path: Path, count: int, ranks: bool
) -> None:
    never_stopped, seconds = reference(tmp_path / "reference", ranks)
    outcomes = [
        tried(tmp_path / f"kill-{number}", kill, never_stopped)
        for number, kill in enumerate(random_kills(count, 1, seconds, ranks))
    ]
    assert [outcome for outcome in outcomes if not outcome.good] == []
    assert any(outcome.resumed for outcome in outcomes) or ranks


def test_a_server_that_hangs_holds_up_neither_training_nor_its_end(tmp_path: Path) -> None:
    (outage,) = outages(tmp_path, ["hang"], [LONG], updates=100_000, stop_after=2.0)
    assert outage.lost == outage.doubled == 0 < outage.late
    # One says what is not sent; on a slow machine a request may time out before, which is the other.
    assert outage.lines in (1, 2) and outage.code == 143
    assert outage.stop_seconds is not None and outage.stop_seconds < 30


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    (full,) = full_disks(tmp_path, [3.0])
    assert full.good, full
