"""docs/architecture.md names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b[a-z_]+(?:/[a-z_0-9]+)+\.py\b", ARCHITECTURE))))
def test_every_module_in_the_architecture_is_there(path: str) -> None:
    assert any((ROOT / folder / path).is_file() for folder in (".", "accumexp"))


def test_every_package_has_a_floor() -> None:
    table = ARCHITECTURE.partition("## From a configuration")[0]
    for part in (ROOT / "accumexp").glob("[a-z]*"):
        assert part.name in table, part.name
    for group in re.findall(r"`accumexp/conf/([a-z]+)/", ARCHITECTURE):
        assert (ROOT / "accumexp" / "conf" / group).is_dir(), group
