"""No checkpoint runs code, fills the memory, blocks or ends in a traceback, however it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accumexp.training.checkpoint import find, load

from ..support.command import run_command
from ..support.hostile import Hostile, cases, faults, run_hostile

CASES = cases()
FEW = (
    *("model: torch.os.system", "model: own_code.Model", "data.root: ${oc.env:HOME}", "config: Tensor"),
    *("a zip bomb", "a tensor longer than its entry", "a pipe", "a pickle that runs code"),
)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sound checkpoint, of update 13."""
    folder = tmp_path_factory.mktemp("sound")
    small = ["model=mlp", "callbacks=ema", "tracking=none", "trainer.progress=false", "device=cpu"]
    done = run_command("run", *small, "trainer.max_updates=13", "hydra.run.dir=run", folder=folder)
    assert done.code == 0, done
    return load(find(folder / "run"))


def check(case: Hostile, command: str, content: dict[str, Any], folder: Path) -> None:
    done, grown, ran = run_hostile(command, case, content, folder)
    assert faults(done, grown, ran) == [], (case.name, done)


@pytest.mark.parametrize("command", ["evaluate", "run"])
def test_a_sound_checkpoint_is_used(command: str, content: dict[str, Any], tmp_path: Path) -> None:
    def same(path: Path, content: dict[str, Any]) -> None:
        from accumexp.training.checkpoint import save

        save(path, content)

    done, _, _ = run_hostile(command, Hostile("sound", same), content, tmp_path / "case")
    assert done.code == 0, done


@pytest.mark.parametrize("case", [case for case in CASES if case.name in FEW], ids=lambda case: case.name)
def test_no_code_runs_and_one_line_says_why(case: Hostile, content: dict[str, Any], tmp_path: Path) -> None:
    check(case, "evaluate", content, tmp_path / "case")


# Both commands read a checkpoint in the same way; `python -m tests.faults hostile` runs both over all.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "command"),
    [(case, ("evaluate", "run")[number % 2]) for number, case in enumerate(CASES)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_every_hostile_checkpoint_is_one_line(
    case: Hostile, command: str, content: dict[str, Any], tmp_path: Path
) -> None:
    check(case, command, content, tmp_path / "case")


def test_the_cases_are_many_and_named_once() -> None:
    names = [case.name for case in CASES]
    assert len(names) >= 60
    assert set(FEW) <= set(names)
