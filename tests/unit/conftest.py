"""A tracking store for each test that needs one, and senders that give up soon."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from accumexp.tracking import sender

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


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Senders that try again soon and give up soon, and of which no thread outlives the test."""
    monkeypatch.setattr(sender, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(sender, "DATABASE_PATIENCE", 0.3)
    yield
    for thread in threading.enumerate():
        if thread.name == sender.THREAD:
            thread.join(10)
