"""The tracking store: a local database or a server, opened safely by several processes at once."""

from __future__ import annotations

import getpass
import logging
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..config.schema import TrackingConfig
from ..errors import UsageError, first_line
from .addresses import URI, check_address, check_server
from .names import legal_name
from .new_database import make_database
from .run_folder import RunFolder, RunStatus
from .ui import run_page, sweep_page, sweep_view

REQUEST_TIMEOUT = 10  # seconds
# No telemetry; one retry, so that a server that is down is found in seconds; a run prints its own address.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_TIMEOUT),
}
DEFAULT_DATABASE = "sqlite:///mlflow.db"
DEFAULT_EXPERIMENT = "accumexp"
EXPERIMENT, EXPERIMENT_ID = "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"
RUN_ID = "MLFLOW_RUN_ID"
GIVEN = (URI, EXPERIMENT, EXPERIMENT_ID, RUN_ID)
# The key of the advisory lock in PostgreSQL: any constant of 64 bits.
OPENING = int.from_bytes(b"accumexp")


class Store:
    """A tracking server or database: its client, its address and its experiment.

    MLflow's environment variables count where the configuration is silent: MLFLOW_TRACKING_URI,
    MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, and MLFLOW_RUN_ID for a run that becomes the parent.

    Args:
        experiment_id: the id of an existing experiment, instead of `config.experiment`.

    Attributes:
        parent_id: the run that new runs are children of unless they have another parent, or None.
        from_environment: the variables that were used.

    Raises:
        UsageError: if it cannot be reached, naming `tracking.uri`.
    """

    def __init__(self, config: TrackingConfig, experiment_id: str | None = None) -> None:
        given = {name: os.environ[name] for name in GIVEN if os.environ.get(name)}
        uri = config.uri or given_uri()
        key = URI if URI in given and not config.uri else "tracking.uri"
        # The driver of accumexp[postgres]; SQLAlchemy's default depends on its version.
        self.uri = re.sub("^postgres(ql)?://", "postgresql+psycopg2://", uri)
        self._database: Path | None = None
        if self.uri.startswith("sqlite:///"):
            self._database = Path(self.uri.removeprefix("sqlite:///")).absolute()
            self.uri = f"sqlite:///{self._database}"
        check_address(self.uri, key)
        self.on_server = self.uri.startswith("http")
        self.ui_command = None if self.on_server else f"mlflow ui --backend-store-uri {self.uri}"
        try:
            self.client = self._client(key)
            reopened = experiment_id is not None
            if not experiment_id and not config.experiment and EXPERIMENT_ID in given:
                experiment_id = self._existing(given[EXPERIMENT_ID])
            name = config.experiment or given.get(EXPERIMENT) or DEFAULT_EXPERIMENT
            self.experiment_id = experiment_id or self._open(name)
            self.parent_id = given.get(RUN_ID)
            if self.parent_id:
                self._check_parent(self.parent_id)
        except UsageError:
            raise
        except ModuleNotFoundError as error:
            extra = ", pip install 'accumexp[postgres]'" if error.name == "psycopg2" else ""
            raise UsageError(f"{key}={self.uri}: needs {error.name}{extra}") from error
        except Exception as error:
            raise UsageError(f"{key}={self.uri}: cannot be used: {first_line(error)}") from error

        self._inode = _inode(self._database) if self._database else None
        ignored = {URI} if config.uri else set()
        if config.experiment or reopened:
            ignored |= {EXPERIMENT, EXPERIMENT_ID}
        if EXPERIMENT_ID in given:
            ignored.add(EXPERIMENT)
        if reopened:
            ignored.add(RUN_ID)
        self.from_environment = [name for name in given if name not in ignored]

    def check_there(self) -> None:
        """
        Raises:
            FileNotFoundError: if the database's file was removed, which SQLite itself does not see.
        """
        if self._database is not None and _inode(self._database) != self._inode:
            raise FileNotFoundError(f"the file {self._database} was removed or replaced during the run")

    @property
    def _server(self) -> str | None:
        return self.uri if self.on_server else None

    def run_address(self, run_id: str) -> str:
        return run_page(self._server, self.experiment_id, run_id)

    def sweep_address(self, parent_id: str) -> str:
        """The page of the parent's children, which MLflow's default view hides."""
        return sweep_page(self._server, self.experiment_id, parent_id)

    def charts_address(self, parent_id: str) -> str:
        """The page that compares the children's curves."""
        return f"{self.sweep_address(parent_id)}&compareRunsMode=CHART"

    def sweep_lines(self, parent_id: str) -> list[str]:
        """The addresses of a sweep's pages, a line each."""
        lines = [f"UI      {self.sweep_address(parent_id)}", f"charts  {self.charts_address(parent_id)}"]
        return [*lines, f"serve   {self.ui_command}"] if self.ui_command else lines

    def arrange_sweep(
        self, parent_id: str, varied: Sequence[str] = ("accum.steps",), metric: str = "accuracy"
    ) -> None:
        """Saves the view of the parent's children for `sweep_address`, grouped over seeds.

        Args:
            varied: the params that distinguish the groups.
            metric: the key of `final/*` that the groups are compared by.
        """
        tag = f"mlflow.sharedViewState.{parent_id}"
        self.client.set_experiment_tag(self.experiment_id, tag, sweep_view(parent_id, varied, metric))

    def log_once(self, run_id: str, values: Mapping[str, float]) -> None:
        """Metrics without a step, in calls of a size that servers take."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(key, value, now, 0) for key, value in values.items()]
        for start in range(0, len(points), 500):
            self.client.log_batch(run_id, points[start : start + 500])

    def create_run(self, name: str | None, tags: Mapping[str, str]) -> str:
        user = getpass.getuser() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
        source = {"mlflow.source.name": "accumexp.run", "mlflow.source.type": "LOCAL", "mlflow.user": user}
        if self.parent_id:
            source["mlflow.parentRunId"] = self.parent_id
        legal = {legal_name(key): value for key, value in {**source, **tags}.items()}
        run = self.client.create_run(self.experiment_id, tags=legal, run_name=name)
        return run.info.run_id

    def open_again(self, run_id: str, command: str) -> None:
        """Marks an ended run as running, with the command that resumes it."""
        self.client.update_run(run_id, status=RunStatus.RUNNING)
        self.client.set_tag(run_id, "accumexp.resumed", command)

    def close_dead_runs(self, held: Path | None = None) -> None:
        """Marks as KILLED the RUNNING runs on whose folders, on this machine, no process works.

        Args:
            held: a folder whose lock this process holds for a run that it has not begun yet.
        """
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        for run in self.client.search_runs(experiments, "attributes.status = 'RUNNING'"):
            path = run.data.tags.get("accumexp.folder")
            folder = RunFolder(Path(path)) if path else None
            if folder is None:
                continue
            is_sweep = "accumexp.sweep" in run.data.tags
            if not (
                folder.sweep_is_dead(held) if is_sweep else folder.path == held or folder.close_if_dead()
            ):
                continue
            summary = folder.summary()
            if summary and summary.error:
                self.client.set_tag(run.info.run_id, "accumexp.error", summary.error)
            ended = summary and folder.path != held and summary.status is not RunStatus.RUNNING
            status = summary.status if summary and ended else RunStatus.KILLED
            self.client.set_terminated(run.info.run_id, status)

    def _check_parent(self, run_id: str) -> None:
        try:
            self.client.get_run(run_id)
        except Exception as error:
            raise UsageError(f"{RUN_ID}={run_id}: no such run in {self.uri}, unset it") from error

    def _client(self, key: str) -> Any:
        if self.on_server:
            check_server(self.uri, key)
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        # After the import, which sets up MLflow's own logging.
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # a line for each retry
        if self._database is not None and not self._database.parent.is_dir():
            raise UsageError(f"{key}={self.uri}: the folder {self._database.parent} is not there")
        with self._alone():
            if self._database is not None and not _is_begun(self._database):
                make_database(self._database)
            client = MlflowClient(self.uri)
            if not self.on_server:
                client.search_experiments(max_results=1)
            if self._database is not None:
                connection = sqlite3.connect(self._database)
                connection.execute("PRAGMA journal_mode=WAL")
                connection.close()
        return client

    def _open(self, name: str) -> str:
        """The id of the experiment `name`, created if it is new."""
        from mlflow.exceptions import MlflowException

        beside = self._database.parent if self._database else Path.cwd()
        artifacts = None if self.on_server else (beside / "mlartifacts").as_uri()
        with self._alone():
            experiment = self.client.get_experiment_by_name(name)
            if experiment is None:
                try:
                    return self.client.create_experiment(name, artifact_location=artifacts)
                except MlflowException:  # another process was faster
                    experiment = self.client.get_experiment_by_name(name)
                    if experiment is None:
                        raise
        if experiment.lifecycle_stage != "active":
            raise UsageError(
                f"tracking.experiment={name}: was deleted in this store; `mlflow gc` removes it, or "
                "choose another name"
            )
        return experiment.experiment_id

    def _existing(self, experiment_id: str) -> str:
        """`experiment_id` of the environment, if the store has such an experiment."""
        from mlflow.exceptions import MlflowException

        try:
            stage = self.client.get_experiment(experiment_id).lifecycle_stage
        except MlflowException:
            stage = None
        if stage != "active":
            ids = ", ".join(sorted(one.experiment_id for one in self.client.search_experiments()))
            raise UsageError(
                f"{EXPERIMENT_ID}={experiment_id}: no such experiment in {self.uri}, which has {ids}"
            )
        return experiment_id

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds a lock: processes that create the tables of one new database at once fail."""
        if self._database is not None:
            with FileLock(f"{self._database}.lock", timeout=300):
                yield
        elif self.uri.startswith("postgresql"):
            from sqlalchemy import NullPool, create_engine, text

            engine = create_engine(self.uri, poolclass=NullPool, connect_args={"connect_timeout": 5})
            with engine.connect() as connection:  # closing it releases the lock
                connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": OPENING})
                yield
        else:
            yield  # a server has created its tables


def given_uri() -> str:
    """The store of MLFLOW_TRACKING_URI, or the database in this folder."""
    return os.environ.get(URI) or DEFAULT_DATABASE


def _is_begun(database: Path) -> bool:
    """Whether the file holds anything; a missing or unreadable one is left to SQLite's own message."""
    try:
        return database.stat().st_size > 0
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
