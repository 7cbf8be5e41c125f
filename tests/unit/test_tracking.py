"""The record in MLflow: opened by many at once, resumed, and refused where it cannot be kept."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

import pytest

from accumexp.config.schema import TrackingConfig
from accumexp.errors import UsageError
from accumexp.tracking import MLflowTracker, Store, reopen
from accumexp.tracking.run_folder import RunStatus

from ..support.stores import config_at, history, opened

WRITER = """
import sys
from accumexp.config.schema import TrackingConfig
from accumexp.tracking import MLflowTracker, Store
config = TrackingConfig(uri=sys.argv[1], system_metrics=False)
store = Store(config)
tracker = MLflowTracker(store, store.create_run(None, {}), config)
for update in range(1, 501):
    tracker.log(update, {"train/loss": float(update), "train/lr": 0.1})
tracker.end("FINISHED")
print(tracker.run_id)
"""


@pytest.mark.slow
def test_a_new_store_opened_by_several_processes_at_once_loses_nothing(tmp_path: Path) -> None:
    config = config_at(tmp_path)
    command = [sys.executable, "-c", WRITER, str(config.uri)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    run_ids = [writer.communicate(timeout=480)[0].strip() for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 8
    client = Store(config).client
    for run_id in run_ids:
        points = client.get_metric_history(run_id, "train/loss")
        assert sorted((p.step, p.value) for p in points) == [(u, float(u)) for u in range(1, 501)]
        assert client.get_run(run_id).info.status == "FINISHED"


KILLED_IN_THE_MIGRATIONS = """
import os, signal, sys
from alembic.runtime import migration
from accumexp.config.schema import TrackingConfig
from accumexp.tracking import Store
steps = []
def killed(self, *arguments, original=migration.HeadMaintainer.update_to_step, **keywords):
    steps.append(1)
    if len(steps) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments, **keywords)
migration.HeadMaintainer.update_to_step = killed
Store(TrackingConfig(uri=sys.argv[1]))
"""


def test_a_kill_while_the_tables_are_made_leaves_a_store_that_opens(tmp_path: Path) -> None:
    config = config_at(tmp_path)
    killed = subprocess.run([sys.executable, "-c", KILLED_IN_THE_MIGRATIONS, str(config.uri)], timeout=240)
    assert killed.returncode == -9
    assert not (tmp_path / "mlflow.db").exists()
    assert len(list(tmp_path.glob("mlflow.db.*.new"))) == 1
    assert Store(config).client.search_experiments()
    assert not list(tmp_path.glob("mlflow.db.*.new*"))


def test_the_default_store_lies_where_the_command_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store(TrackingConfig())
    assert store.uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert store.ui_command == f"mlflow ui --backend-store-uri {store.uri}"
    location = store.client.get_experiment(store.experiment_id).artifact_location
    assert location == (tmp_path / "mlartifacts").as_uri()


def test_law_8_a_resumed_record_doubles_no_point_and_misses_none(folder: Path) -> None:
    tracker = opened(folder)
    for update in range(1, 8):
        tracker.log(update, {"train/loss": float(update), "eval/accuracy": 0.5})
    tracker.end(RunStatus.KILLED)
    again = reopen(config_at(folder), tracker.identity())
    assert isinstance(again, MLflowTracker)
    assert again.store.client.get_run(again.run_id).info.status == "RUNNING"
    for update in range(5, 11):
        again.log(update, {"train/loss": float(update), "eval/accuracy": 0.5})
    again.end(RunStatus.FINISHED)
    assert history(again, "train/loss") == [(u, float(u)) for u in range(1, 11)]
    assert [step for step, _ in history(again, "eval/accuracy")] == list(range(1, 11))
    assert again.store.client.get_run(again.run_id).info.status == "FINISHED"


def test_a_logged_model_is_ranked_by_its_evaluation_and_doubles_no_point(folder: Path) -> None:
    tracker = opened(folder)
    for update, accuracy in ((10, 0.7), (20, 0.9), (30, 0.8)):
        tracker.log(update, {"eval/accuracy": accuracy})
        tracker.flush()
        path = folder / f"update-{update:08d}.pt"
        path.write_bytes(b"weights")
        tracker.checkpoint(path, update, {"eval/accuracy": accuracy})
    tracker.end(RunStatus.FINISHED)
    ranked = tracker.store.client.search_logged_models(
        [tracker.store.experiment_id], order_by=[{"field_name": "metrics.eval/accuracy", "ascending": False}]
    )
    assert [model.name for model in ranked] == ["update-20", "update-30", "update-10"]
    assert ranked[0].tags["accumexp.checkpoint"] == "checkpoints/update-00000020.pt"
    assert history(tracker, "eval/accuracy") == [(10, 0.7), (20, 0.9), (30, 0.8)]


def test_stores_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tracking.uri=http://127.0.0.1:9: no server answers"):
        Store(TrackingConfig(uri="http://127.0.0.1:9"))
    with pytest.raises(UsageError, match=r"tracking.uri=sqlite:////nowhere/mlflow.db: the folder"):
        Store(TrackingConfig(uri="sqlite:////nowhere/mlflow.db"))
    (tmp_path / "mlflow.db").write_text("no database")
    with pytest.raises(UsageError, match=r"tracking.uri=sqlite:.*cannot be used"):
        Store(config_at(tmp_path))


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("postgresql://me:secret@db/runs", "~/.pgpass or PGPASSWORD"),
        ("postgresql+psycopg2://me:secret@db/runs", "~/.pgpass or PGPASSWORD"),
        ("http://me:secret@127.0.0.1:9", "MLFLOW_TRACKING_PASSWORD"),
        ("mysql+pymysql://me@db/runs", "start `mlflow server"),
    ],
)
def test_what_would_tell_a_password_or_race_is_refused(uri: str, says: str) -> None:
    with pytest.raises(UsageError, match="tracking.uri=") as refused:
        Store(TrackingConfig(uri=uri))
    assert says in str(refused.value) and "secret" not in str(refused.value)


def test_a_postgresql_database_needs_its_driver_and_an_answer() -> None:
    """Whether it is installed or not: one line, soon."""
    with pytest.raises(UsageError, match="needs psycopg2, pip install|127.0.0.1.*port 9 failed"):
        Store(TrackingConfig(uri="postgresql://me@127.0.0.1:9/runs"))


POSTGRES = Path(next(iter(sorted(glob("/usr/lib/postgresql/*/bin"), reverse=True)), "/nowhere"))


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    """The address of a PostgreSQL of this test's own, where it is installed."""
    pytest.importorskip("psycopg2")
    if not (POSTGRES / "initdb").exists():
        pytest.skip("PostgreSQL is not installed")
    # It refuses to run as root.
    tmp_path.chmod(0o755)
    data = Path(tempfile.mkdtemp(prefix="accumexp-pg-", dir="/tmp"))
    become: dict[str, Any] = {}
    if os.getuid() == 0:
        shutil.chown(data, "postgres", "postgres")
        become = {"user": "postgres", "cwd": "/"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet: dict[str, Any] = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off"
    control = [str(POSTGRES / "pg_ctl"), "-D", str(data / "db")]
    try:
        made = [str(POSTGRES / "initdb"), "-D", str(data / "db"), "-U", "me", "-A", "trust", "-N"]
        subprocess.run(made, **quiet, **become)
        subprocess.run([*control, "-o", options, "-l", str(data / "log"), "-w", "start"], **quiet, **become)
        yield f"postgresql://me@127.0.0.1:{port}/postgres"
        subprocess.run([*control, "-m", "immediate", "stop"], **quiet, **become)
    finally:
        shutil.rmtree(data, ignore_errors=True)


def test_a_new_postgresql_database_opened_by_several_at_once_loses_nothing(
    tmp_path: Path, database: str
) -> None:
    command = [sys.executable, "-c", WRITER, database]
    writers = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    run_ids = [writer.communicate(timeout=240)[0].strip() for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4
    store = Store(TrackingConfig(uri=database))
    for run_id in run_ids:
        points = store.client.get_metric_history(run_id, "train/loss")
        assert sorted((p.step, p.value) for p in points) == [(u, float(u)) for u in range(1, 501)]
    assert store.ui_command == f"mlflow ui --backend-store-uri {store.uri}"
    location = store.client.get_experiment(store.experiment_id).artifact_location
    assert location == (tmp_path / "mlartifacts").as_uri()


def test_a_deleted_experiment_or_run_is_named(folder: Path) -> None:
    tracker = opened(folder)
    tracker.end(RunStatus.FINISHED)
    with pytest.raises(UsageError, match="resume: run 0000 is not in"):
        reopen(config_at(folder), {**tracker.identity(), "run_id": "0000"})
    tracker.store.client.delete_experiment(tracker.store.experiment_id)
    with pytest.raises(UsageError, match="tracking.experiment=accumexp: was deleted"):
        Store(config_at(folder))
