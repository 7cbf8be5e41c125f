"""The MLflow UI as a sweep arranges it, seen by a real browser on a real server."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from accumexp.config.schema import ReportConfig, TrackingConfig
from accumexp.report.analysis import make_report
from accumexp.report.jobs import from_store
from accumexp.report.publish import log_to_parent_run, write
from accumexp.tracking import Store, sweep_of

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine"),
]
STARTS_WITHIN = 120  # seconds


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server with an empty store."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    line += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        str(folder / "kept"),
    ]
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    log = (folder / "server.log").open("w")
    process = subprocess.Popen(line, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address, process, folder / "server.log")
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)
        log.close()


def _wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    until = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def sweep(server: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str]:
    """A sweep of 2 x 2 jobs with a report, and one run of no sweep, in the server's store."""
    store = Store(TrackingConfig(uri=server))
    parent = store.create_run("sweep of the test", {"accumexp.sweep": "true", "accumexp.command": "made up"})
    store.arrange_sweep(parent)
    for steps in (1, 4):
        for seed in (0, 1):
            job = store.create_run(f"job-of-{steps}-{seed}", {"mlflow.parentRunId": parent})
            params = {"accum.steps": steps, "seed": seed, "data.batch_size": 128, "accum.processes": 1}
            for key, value in params.items():
                store.client.log_param(job, key, value)
            store.client.set_tag(job, "accumexp.overrides", f'["accum.steps={steps}", "seed={seed}"]')
            for update in range(1, 6):
                store.client.log_metric(job, "train/loss", 2.0 / update, step=update)
            store.log_once(job, {"final/accuracy": 0.9 + 0.01 * seed, "final/update_ms": 5.0 * steps})
            store.client.set_terminated(job, "FINISHED")
    store.client.set_terminated(store.create_run("no-job-of-it", {}), "FINISHED")
    store.client.set_terminated(parent, "FINISHED")
    report = make_report(from_store(store, sweep_of(store, parent)), ReportConfig(margin=2.0))
    log_to_parent_run(report, write(report, tmp_path_factory.mktemp("written")))
    return store, parent


def seen(address: str, folder: Path) -> str:
    """The text that a browser shows at `address` once all is loaded."""
    assert BROWSER
    line = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    line += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}"]
    line += ["--window-size=1900,1200", "--virtual-time-budget=30000", "--dump-dom", address]
    shown = subprocess.run(line, capture_output=True, text=True, timeout=180, check=True).stdout
    shown = re.sub(r"<(script|style).*?</\1>", "", shown, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", shown))


def test_the_address_opens_the_jobs_grouped_over_seeds(sweep: tuple[Store, str], tmp_path: Path) -> None:
    store, parent = sweep
    text = seen(store.sweep_address(parent), tmp_path)
    assert "4 matching runs" in text and "Group by: accum.steps" in text
    assert text.index("Group: 1") < text.index("Group: 4")
    assert all(f"job-of-{steps}-{seed}" in text for steps in (1, 4) for seed in (0, 1))
    assert "no-job-of-it" not in text and "sweep of the test" not in text
    for column in ("final/accuracy", "final/update_ms"):
        assert column in text
    assert "(average)" in text


def test_the_other_address_opens_the_curves_over_each_other(sweep: tuple[Store, str], tmp_path: Path) -> None:
    store, parent = sweep
    text = seen(store.charts_address(parent), tmp_path)
    assert "4 matching runs" in text and "Group: 1" in text and "Group: 4" in text
    assert re.search(r"\btrain \(1\)", text) and re.search(r"\bfinal \(2\)", text)


def test_the_parents_page_shows_the_verdict_and_the_tables(sweep: tuple[Store, str], tmp_path: Path) -> None:
    store, parent = sweep
    text = seen(store.run_address(parent), tmp_path)
    assert "accum.steps=4 is undecided against accum.steps=1 at a margin of 2 points." in text
    assert "accumexp.verdict" in text and "final/accuracy/accum.steps 4" in text
