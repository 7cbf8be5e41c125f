"""Each wrong window is caught by the check that is meant to catch it."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from accumexp.proof import certify

from ..support.ranks import on_ranks
from . import mutants, wrong_ranks
from .wrong_loops import CLASSES, Loop, right
from .wrong_ranks import LOOPS

# The long windows are for `python -m tests.proof.mutants`; the shorter ones show the same.
SHORT = [loop for loop in mutants.LOOPS if loop.setting.steps <= 32]


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("loop", SHORT, ids=lambda loop: loop.name)
def test_every_bug_is_caught_by_its_check_and_no_right_loop_is(loop: Loop) -> None:
    assert mutants.wrong(loop, mutants.certified(loop)) == ""


@pytest.mark.slow
def test_every_bug_between_ranks_is_caught_by_its_check(tmp_path: Path) -> None:
    every = on_ranks(2, tmp_path, mutants.of_ranks, 6)
    troubles = [
        mutants.wrong(loop, certificate, 6) for loop, certificate in zip(LOOPS, every[0], strict=True)
    ]
    assert troubles == [""] * len(LOOPS)
    assert [c.verdict for c in every[0]] == [c.verdict for c in every[1]]


def test_the_table_counts_what_was_caught() -> None:
    caught = next(loop for loop in SHORT if loop.name == "micro means not divided")
    loops = [SHORT[0], caught, Loop("not a bug at all", CLASSES, SHORT[0].make, "gradient")]
    certificates = [mutants.certified(loop, 2) for loop in loops]
    shown = mutants.table(loops, certificates, 2).splitlines()
    assert shown[-1] == "caught 1/2, right loops proved 1/1"
    assert "!!  not a bug at all" in shown
    assert mutants.wrong(loops[2], certificates[2]) == "not caught"


def test_names_are_unique() -> None:
    names = [loop.name for loop in [*mutants.LOOPS, *wrong_ranks.LOOPS]]
    assert len(set(names)) == len(names)


def test_a_wrong_loss_of_the_larger_batch_is_not_blamed_on_rounding() -> None:
    setting = CLASSES
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    certificate = certify(right, setting.model(), smoothed, setting.batch(), setting.steps, updates=1)
    assert certificate.verdict == "not proved"
