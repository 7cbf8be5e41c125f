"""A `_target_` that cannot be built: the part or the argument that is wrong, and what is near to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from accumexp.config.instantiate import build
from accumexp.errors import UsageError

MODEL = """
from math import floor

class Level:
    def __init__(self, width=24, noise=0.0): pass

def wraps(inner): return Level(wdth=inner)
"""


@pytest.fixture
def tanks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user's package of two modules, of which one imports what is not installed."""
    folder = tmp_path / "ponds"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "model.py").write_text(MODEL)
    (folder / "data.py").write_text("import not_installed")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("ponds")]:
        del sys.modules[name]


@pytest.mark.usefixtures("tanks")
@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("ponds.model.LevelU", "ponds.model has no LevelU, did you mean ponds.model.Level?"),
        ("ponds.model.Net", "ponds.model has no Net, it has Level, wraps"),
        ("ponds.modle.Level", "ponds has no modle, did you mean ponds.model?"),
        ("ponds.model.Level.made", "ponds.model.Level has no made"),
        (
            "pond.model.Level",
            "there is no package pond; run in the folder that holds it",
        ),
        ("Level", "names no module, give package.module.Level"),
        (
            "ponds.data.Tanks",
            "Error loading 'ponds.data.Tanks': ModuleNotFoundError(\"No module",
        ),
    ],
)
def test_the_part_of_a_path_that_is_not_there_is_named(target: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        build({"_target_": target}, "model")
    assert str(raised.value).startswith(f"model._target_={target}: {says}")
    with pytest.raises(UsageError) as raised:
        build({"_target_": "ponds.model.Level", "width": {"_target_": target}}, "model")
    assert str(raised.value).startswith(f"model (ponds.model.Level): {target}: {says}")


@pytest.mark.usefixtures("tanks")
@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        (
            "Level",
            {"widht": 3},
            "takes no argument widht, it takes width, noise; did you mean model.width?",
        ),
        (
            "Level",
            {"labels": 3},
            "takes no argument labels, it takes width, noise; ~model.labels leaves it out",
        ),
        ("wraps", {"inner": 3}, "Level.__init__() got an unexpected keyword argument 'wdth'"),
    ],
)
def test_an_argument_that_is_not_taken_is_compared_with_those_that_are(
    name: str, arguments: dict[str, int], says: str
) -> None:
    with pytest.raises(UsageError) as raised:
        build({"_target_": f"ponds.model.{name}", **arguments}, "model")
    assert str(raised.value) == f"model (ponds.model.{name}): {says}"
