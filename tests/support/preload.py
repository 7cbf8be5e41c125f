"""What the process that tests fork from has ready: imported libraries, and an empty MLflow database.

MLflow makes a new database by all its migrations since the first, which takes more than a second. A forked
process copies one that is made already; a test of a database's first opening starts its command `fresh`.
"""

from __future__ import annotations

import gc
import logging
import os
import sqlite3
import tempfile
import warnings
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import hydra.main  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import mlflow.store.db.utils as database
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import sqlalchemy.orm
    import torch.distributed.launcher.api  # noqa: F401
    import torchmetrics.classification  # noqa: F401
    import torchvision  # noqa: F401
    from hydra.core.plugins import Plugins

    # Of this package nothing that reads its environment or the command line when it is imported.
    import accumexp.accum
    import accumexp.tracking.tracker
    import accumexp.training.experiment  # noqa: F401

MIGRATED = database._initialize_tables


def _template() -> bytes:
    """A new database, made in a process of its own: alembic and MLflow leave nothing in this one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mlflow.db"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                logging.disable()
                MIGRATED(sqlalchemy.create_engine(f"sqlite:///{path}"))
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        return path.read_bytes()


def _initialize(engine: Any) -> None:
    """Fills a new database of sqlite with the template, and any other as MLflow does."""
    path = engine.url.database
    if engine.url.drivername != "sqlite" or not path or os.path.getsize(path):
        MIGRATED(engine)
        return
    template, new = sqlite3.connect(":memory:"), sqlite3.connect(path)
    template.deserialize(TEMPLATE)
    template.backup(new)
    new.close()
    template.close()


TEMPLATE = _template()
database._initialize_tables = _initialize
sqlalchemy.orm.configure_mappers()
Plugins.instance()
gc.freeze()
