"""Law: a new database is put in its place whole, and what others write meanwhile is still flushed to disk."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from mlflow import MlflowClient
from sqlalchemy import create_engine, text

from accumexp.tracking.new_database import make_database

OFF, FULL = 0, 2


def synced(database: Path) -> int:
    with create_engine(f"sqlite:///{database}").connect() as connection:
        return connection.execute(text("PRAGMA synchronous")).scalar_one()


def test_only_the_new_database_is_not_flushed_and_only_while_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def migrated(self: MlflowClient, **options: object) -> None:
        (new,) = tmp_path.glob("mlflow.db.*.new")
        seen["new"], seen["other"] = synced(new), synced(tmp_path / "other.db")

    monkeypatch.setattr(MlflowClient, "search_experiments", migrated)
    make_database(tmp_path / "mlflow.db")
    assert seen == {"new": OFF, "other": FULL}
    assert synced(tmp_path / "mlflow.db") == FULL


def test_what_a_killed_process_left_is_removed_and_the_new_one_is_whole(tmp_path: Path) -> None:
    left = tmp_path / "mlflow.db.0a1b2c3d.new"
    left.write_bytes(b"half of a database")
    make_database(tmp_path / "mlflow.db")
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM experiments").fetchone() == (1,)
