"""Runs in a store of a test's own, and stores that do not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accumexp.config.schema import TrackingConfig
from accumexp.tracking import MLflowTracker, Store
from accumexp.tracking.run_folder import RunFolder

from .command import environment
from .forked import forked

# Seconds for a store that works: a loaded machine may hold it up for longer than `impatient` waits.
LONG = 60


def config_at(folder: Path, **settings: Any) -> TrackingConfig:
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    return TrackingConfig(uri=uri, system_metrics=False, **settings)


def make_empty(folder: Path) -> Path:
    """The new store of `config_at(folder)`, without a run; forked processes have its tables ready to copy."""
    done = forked(_make_empty, folder, folder=folder, env=environment(), seconds=120)
    assert done[0] == 0, done
    return folder / "mlflow.db"


def _make_empty(folder: Path) -> None:
    Store(config_at(folder)).client.search_experiments()


def opened(folder: Path, **settings: Any) -> MLflowTracker:
    """A run whose own folder is `folder` / "run"."""
    config = config_at(folder, **settings)
    store = Store(config)
    run = RunFolder(folder / "run")
    run.path.mkdir()
    return MLflowTracker(store, store.create_run("a run", {}), config, folder=run)


def history(tracker: MLflowTracker, key: str) -> list[tuple[int, float]]:
    assert tracker.run_id
    return [(p.step, p.value) for p in tracker.store.client.get_metric_history(tracker.run_id, key)]


class Faults:
    """Stands before a store's client: its calls are refused, have no answer, or lose their answer.

    Attributes:
        mode: None for a store that answers, "refuse", "hang" (until the mode changes) or "lose", which makes
            the call and raises.
        calls: the names of the calls that were made, and what they were given.
    """

    def __init__(self, store: Store) -> None:
        self._client = store.client
        self.mode: str | None = None
        self.only: str | None = None
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.answering = threading.Event()
        store.client = self

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            mode = self.mode if self.only in (None, name) else None
            self.calls.append((name, arguments))
            if mode == "refuse":
                raise ConnectionError("gone")
            if mode == "hang":
                self.answering.wait(60)
            answer = method(*arguments, **named)
            if mode == "lose":
                raise ConnectionError("no answer came")
            return answer

        return call


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def losses(count: int, first: int = 1) -> list[tuple[int, float]]:
    return [(update, float(update)) for update in range(first, first + count)]


def log_losses(tracker: MLflowTracker, count: int, first: int = 1) -> None:
    for update, loss in losses(count, first):
        tracker.log(update, {"train/loss": loss})
