"""A new local database with MLflow's tables, made beside its place and put there whole."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


def make_database(database: Path) -> None:
    """Makes a new database at `database`. The caller keeps other processes from doing the same.

    A process that is killed among the migrations leaves a database that none can open.
    """
    from mlflow import MlflowClient

    for left in database.parent.glob(f"{database.name}.*.new*"):
        left.unlink(missing_ok=True)
    new = Path(f"{database}.{uuid4().hex[:8]}.new")
    with _unsynced(new):
        MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
    with new.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(new, database)


@contextmanager
def _unsynced(database: Path) -> Iterator[None]:
    """Lets connections that are made to `database` leave its writing to the system.

    The migrations are hundreds of transactions, of which SQLite flushes each to disk: half of their time.
    """
    from sqlalchemy import Engine, event

    def connected(connection: Any, _: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            _, _, path = connection.execute("PRAGMA database_list").fetchone()
            if Path(path).name == database.name:
                connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", connected)
    try:
        yield
    finally:
        event.remove(Engine, "connect", connected)
