"""A report's links into its store, and a sweep that is deleted there."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest

from accumexp.config.schema import TrackingConfig
from accumexp.errors import UsageError
from accumexp.report.__main__ import main
from accumexp.report.page import page
from accumexp.tracking import Store

from ..support.past_sweeps import job, reported, sweep
from ..support.stores import make_empty


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    return Store(TrackingConfig(uri=f"sqlite:///{make_empty(folder)}"))


def swept(store: Store, jobs: int) -> str:
    """A sweep with a logged model for each of its jobs."""
    parent = store.create_run("sweep", {"accumexp.sweep": "true"})
    for _ in range(jobs):
        job = store.create_run("job", {"mlflow.parentRunId": parent})
        store.client.create_logged_model(store.experiment_id, source_run_id=job)
        store.client.set_terminated(job)
    store.client.set_terminated(parent)
    return parent


def clean(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["accumexp.report", *words])
    main()


def test_a_sweep_is_cleaned_and_another_is_left(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = store.uri
    first, second = swept(store, 2), swept(store, 1)
    clean(monkeypatch, f"clean={first}", f"tracking.uri={uri}")
    printed = "".join(capsys.readouterr().out.split("\n"))
    assert "3 runs and 2 logged models are deleted" in printed and "mlflow gc --backend-store-uri" in printed
    experiments = [store.experiment_id]
    left = {run.info.run_id for run in store.client.search_runs(experiments)}
    assert second in left and len(left) == 2
    assert len(store.client.search_logged_models(experiments)) == 1
    store.client.update_run(second, status="RUNNING")
    with pytest.raises(UsageError, match=r"clean=.*: the sweep is still running"):
        clean(monkeypatch, f"clean={second}", f"tracking.uri={uri}")


def test_the_page_links_to_its_runs_and_names_all_versions(store: Store) -> None:
    jobs = [
        job(f"accum.steps={k}", "seed=0", final={"accuracy": 0.9}, tags={"accumexp.python": f"3.1{k}.0"})
        for k in (1, 4)
    ]
    made = replace(sweep(*jobs), store=store, run_id="parent")
    html = page(reported(made), {})
    links = re.findall(r'href="([^"]+)"', html)
    assert len(links) == 5 and all("?workflowType=machine_learning" in link for link in links)
    assert "Python 3.11.0 and 3.14.0" in html and "mlflow ui --backend-store-uri sqlite:///" in html
    assert "href" not in page(reported(sweep(*jobs)), {})
