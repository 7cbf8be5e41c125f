"""A tracking store for each test that needs one."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from ..support.stores import make_empty


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store: making its tables takes seconds, copying them none."""
    return make_empty(tmp_path_factory.mktemp("store"))


@pytest.fixture
def folder(tmp_path: Path, migrated: Path) -> Path:
    with sqlite3.connect(migrated) as source, sqlite3.connect(tmp_path / "mlflow.db") as copy:
        source.backup(copy)
    source.close()
    copy.close()
    return tmp_path
