"""What the process that tests fork from has ready: imported modules, and an empty MLflow database.

MLflow makes a new database by all its migrations since the first, which takes more than a second. A forked
process copies one that is made already; a test of a database's first opening starts its command `fresh`.
"""

from __future__ import annotations

import functools
import gc
import importlib
import logging
import os
import sqlite3
import tempfile
import warnings
from pathlib import Path
from typing import Any

MODULES = (
    "alembic.command",
    "hydra.main",
    "matplotlib.backends.backend_agg",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "rich.logging",
    "sklearn.datasets",
    "sqlalchemy.dialects.sqlite",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.checkpoint.state_dict_loader",
    "torch.distributed.checkpoint.state_dict_saver",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "torch.distributed.fsdp",
    "torch.distributed.launcher.api",
    "torchmetrics.classification",
    "torchvision",
    # None of the modules that `python -m` runs. What `accumexp.cli` reads of its environment when it is
    # imported, a forked process reads again.
    "accumexp.models",
    "accumexp.plan.frontier",
    "accumexp.prove.session",
    "accumexp.report.publish",
    "accumexp.run.command",
    "accumexp.run.session",
    "accumexp.run.sweep_end",
    "accumexp.training.progress_display",
    "accumexp.training.shard_reader",
    "accumexp.training.trained_model",
    # Ranks import the module of the test that starts them.
    "pytest",
    "tests.support.ranks",
    "tests.support.reference",
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for module in MODULES:
        importlib.import_module(module)
    import mlflow.store.db.utils as database
    import sqlalchemy.orm
    from hydra import compose, initialize_config_dir
    from hydra.core.plugins import Plugins

    from accumexp.conf import conf_dir

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
database._get_latest_schema_revision = functools.cache(database._get_latest_schema_revision)
with initialize_config_dir(conf_dir(), version_base="1.3"):
    compose("config", ["model=mlp"])  # fills the caches of Hydra's parsers
sqlalchemy.orm.configure_mappers()
Plugins.instance()
gc.freeze()
