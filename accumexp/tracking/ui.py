"""The pages of MLflow's UI: their addresses, and the view in which a sweep's runs are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence

LOCAL = "http://127.0.0.1:5000"
# Without it MLflow 3 opens an experiment as one of GenAI traces, without its runs' metrics.
WORKFLOW = "workflowType=machine_learning"
COSTS = ("update_ms", "samples_per_second", "activation_mib", "peak_memory_mib")


def runs_page(server: str | None, experiment_id: str) -> str:
    """The address of an experiment's runs, of `server` or of a UI on this machine."""
    return f"{(server or LOCAL).rstrip('/')}/#/experiments/{experiment_id}/runs"


def run_page(server: str | None, experiment_id: str, run_id: str) -> str:
    return f"{runs_page(server, experiment_id)}/{run_id}?{WORKFLOW}"


def sweep_page(server: str | None, experiment_id: str, parent_id: str) -> str:
    """The address of the parent's children, in the view that `sweep_view` describes."""
    return f"{runs_page(server, experiment_id)}?{WORKFLOW}&viewStateShareKey={parent_id}"


def sweep_view(parent_id: str, varied: Sequence[str], metric: str) -> str:
    """The view of the parent's children, grouped over seeds by the params `varied`.

    In the form of the UI's own shared views, which MLflow does not document (as of 3.17); a UI without them
    shows its default view.
    """
    view = {
        "searchFilter": f"tags.mlflow.parentRunId = '{parent_id}'",
        "orderByKey": "params.`accum.steps`",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": [f"params.`{key}`" for key in (*varied, "seed")]
        + [f"metrics.`final/{key}`" for key in dict.fromkeys((metric, "loss", *COSTS))],
        "columnOrder": [],
        "columnWidths": {},
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "param", "groupByData": key} for key in varied],
        },
    }
    return json.dumps(view)
