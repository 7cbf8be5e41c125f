"""Sweeps and runs in the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from .store import Store

PARENT = "mlflow.parentRunId"
SWEEP = "accumexp.sweep"


@dataclass(frozen=True)
class PastRun:
    """A run in the store. Times are seconds since 1970; `ended` is 0 for a run that has not ended."""

    run_id: str
    experiment_id: str
    name: str
    status: str
    started: float
    ended: float
    params: dict[str, str]
    metrics: dict[str, float]  # the newest value of each key
    tags: dict[str, str]


def newest_sweep(store: Store) -> PastRun | None:
    """The sweep that was started last, in any experiment."""
    experiments = [experiment.experiment_id for experiment in store.client.search_experiments()]
    runs = store.client.search_runs(
        experiments, f"tags.`{SWEEP}` = 'true'", max_results=1, order_by=["attributes.start_time DESC"]
    )
    return _past(runs[0]) if runs else None


def sweep_of(store: Store, run_id: str) -> PastRun:
    """The sweep with this id, or of the job with this id. Raises a `UsageError` if there is none."""
    try:
        run = _past(store.client.get_run(run_id))
    except Exception as error:
        raise UsageError(f"sweep={run_id}: no such folder, and no such run in {store.uri}") from error
    if SWEEP not in run.tags and PARENT in run.tags:
        run = _past(store.client.get_run(run.tags[PARENT]))
    if SWEEP not in run.tags:
        raise UsageError(f"sweep={run_id}: is a single run; a sweep's folder or parent run is needed")
    return run


def jobs_of(store: Store, sweep: PastRun) -> list[PastRun]:
    """The runs of a sweep's jobs, oldest first."""
    query = f"tags.`{PARENT}` = '{sweep.run_id}'"
    options = {"max_results": 1000, "order_by": ["attributes.start_time ASC"]}
    page = store.client.search_runs([sweep.experiment_id], query, **options)
    runs = list(page)
    while page.token:
        page = store.client.search_runs([sweep.experiment_id], query, page_token=page.token, **options)
        runs += page
    return [_past(run) for run in runs]


def delete_sweep(store: Store, sweep: PastRun) -> tuple[int, int]:
    """Marks a sweep's runs and their logged models as deleted, for `mlflow gc` to remove.

    Returns:
        The numbers of runs, the parent's among them, and of logged models.
    """
    runs = [*jobs_of(store, sweep), sweep]
    models = 0
    for run in runs:
        query = f"source_run_id = '{run.run_id}'"
        while page := store.client.search_logged_models([run.experiment_id], query, max_results=100):
            for model in page:
                store.client.delete_logged_model(model.model_id)
            models += len(page)
        store.client.delete_run(run.run_id)
    return len(runs), models


def curve(store: Store, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of every point of a metric, by step; a step logged twice counts once, the newest."""
    points = sorted(store.client.get_metric_history(run_id, key), key=lambda p: (p.step, p.timestamp))
    return list({point.step: (point.step, point.value) for point in points}.values())


def _past(run: Any) -> PastRun:
    info, data = run.info, run.data
    return PastRun(
        info.run_id,
        info.experiment_id,
        info.run_name or info.run_id,
        info.status,
        (info.start_time or 0) / 1e3,
        (info.end_time or 0) / 1e3,
        dict(data.params),
        dict(data.metrics),
        dict(data.tags),
    )
