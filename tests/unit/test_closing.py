"""The end of a sweep: what still runs elsewhere is left to run, and a store that is gone costs no report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from omegaconf import OmegaConf

from accumexp.config.schema import TrackingConfig
from accumexp.errors import TrainingError
from accumexp.run.sweep_end import closing_sweep
from accumexp.sweeps.job_folders import Launch, begin_launch, job_folder_name
from accumexp.sweeps.sweep import launched_sweep
from accumexp.tracking import Store
from accumexp.tracking.json_file import write_json
from accumexp.tracking.run_folder import RunFolder

GONE = "http://127.0.0.1:9"  # where nothing listens


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(TrackingConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}"))


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Path]:
    """Two launches, each of which has one job: 0 that runs and 1 that is finished."""
    folder = tmp_path / "swept"
    for launch, status in enumerate(("RUNNING", "FINISHED")):
        begin_launch(folder, Launch("python -m accumexp.run", [f"seed={launch}"], []))
        over(folder, launch, status)
    yield folder
    launched_sweep.reset()


def over(folder: Path, launch: int, status: str, **more: Any) -> Path:
    overrides = [f"seed={launch}"]
    job = folder / job_folder_name(folder, launch, 0, overrides[0], overrides)
    job.mkdir(exist_ok=True)
    final = {"accuracy": 0.9, "loss": 0.25, "updates": 4.0, "seconds": 1.0}
    summary = {"status": status, "overrides": overrides, "launch": launch, "run_id": None, "final": final}
    write_json(job / "summary.json", {**summary, **more})
    return job


def parent(folder: Path, store: Store, uri: str = "") -> str:
    tags = {"accumexp.sweep": "true", "accumexp.folder": str(folder)}
    run_id = store.create_run("sweep", tags)
    written = {"run_id": run_id, "experiment_id": store.experiment_id, "uri": uri or store.uri, "launch": 1}
    write_json(folder / "sweep.json", written)
    return run_id


def close(folder: Path, launch: int, changes: Mapping[str, str] | None = None) -> None:
    with closing_sweep([], changes):
        launched_sweep.folder, launched_sweep.launches = folder, (launch,)


def status(store: Store, run_id: str) -> str:
    return store.client.get_run(run_id).info.status


@pytest.mark.parametrize("lock", [".job.lock", ".ranks.lock"])
def test_a_job_that_another_launch_still_runs_is_left_to_it(
    sweep: Path, store: Store, lock: str, capsys: pytest.CaptureFixture[str]
) -> None:
    job, sweeps = store.create_run("job", {}), parent(sweep, store)
    store.client.set_tag(job, "mlflow.parentRunId", sweeps)
    running = over(sweep, 0, "RUNNING", run_id=job)
    (running / ".job.lock").touch()
    with FileLock(running / lock):
        close(sweep, launch=1)  # without an error
    output = capsys.readouterr().out
    assert "jobs of another launch still run: 0_seed=0\n" in output and "go on with" not in output
    assert [status(store, run) for run in (job, sweeps)] == ["RUNNING", "RUNNING"]

    with pytest.raises(TrainingError, match="1 of 2 jobs failed\n  job seed=0: died\ngo on with"):
        close(sweep, launch=1)  # its process is gone by now
    assert [status(store, run) for run in (job, sweeps)] == ["KILLED", "FAILED"]
    assert "still run" not in capsys.readouterr().out


def test_a_job_of_ones_own_launch_is_over_when_its_sweep_is(sweep: Path) -> None:
    with FileLock(sweep / "0_seed=0" / ".ranks.lock"):  # ranks that are about to end with their launcher
        with pytest.raises(TrainingError, match="job seed=0: died"):
            close(sweep, launch=0)


def test_a_store_that_is_gone_at_the_end_costs_one_line_and_no_report(
    sweep: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    parent(sweep, store, GONE)
    over(sweep, 0, "FAILED", error="no luck")
    with pytest.raises(
        TrainingError, match="1 of 2 jobs failed\n  job seed=0: no luck\ngo on with\n  python"
    ):
        close(sweep, launch=1)
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"warning: the sweep's end did not reach {GONE}: ")
    assert f"sweep   {sweep}\n" in out and (sweep / "report" / "report.html").is_file()


def test_settings_of_a_report_given_to_a_resumed_sweep_are_taken(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    over(sweep, 0, "FINISHED")
    close(sweep, 1, {"report.write": "false"})
    assert not (sweep / "report").exists() and "no report" not in capsys.readouterr().err
    close(sweep, 1, {"report.metric": "nonsense"})
    assert "nonsense" in capsys.readouterr().err
    assert json.loads((sweep / "launches.json").read_text()).keys() == {"0", "1"}


def test_a_report_that_cannot_be_imported_is_one_line(
    sweep: Path, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweeps = parent(sweep, store)
    over(sweep, 0, "FINISHED")
    monkeypatch.setitem(sys.modules, "accumexp.report.publish", None)
    close(sweep, launch=1)
    assert status(store, sweeps) == "FINISHED"
    line, _ = capsys.readouterr().err.splitlines()
    assert line.startswith("no report: ") and line.endswith("again with")


def test_the_parent_of_a_sweep_whose_launcher_was_killed_is_closed(sweep: Path, store: Store) -> None:
    """As soon as nobody launches it and nobody works on its jobs, and not before."""
    sweeps = parent(sweep, store)
    launcher = RunFolder(sweep).launch_lock(1)
    with launcher:
        store.close_dead_runs()
        assert status(store, sweeps) == "RUNNING"
    job = sweep / "0_seed=0"
    (job / ".ranks.lock").touch()
    with FileLock(job / ".ranks.lock"):
        store.close_dead_runs()
        assert status(store, sweeps) == "RUNNING"
    store.close_dead_runs(job)  # a job of it on another machine than the launcher
    assert status(store, sweeps) == "RUNNING"
    elsewhere = Store(TrackingConfig(uri=store.uri, experiment="other"))
    elsewhere.close_dead_runs()
    assert status(store, sweeps) == "KILLED"


def test_a_launch_is_held_until_its_sweep_is_closed(tmp_path: Path) -> None:
    cfg: Any = OmegaConf.create(
        {
            "hydra": {
                "sweep": {"dir": str(tmp_path / "swept")},
                "overrides": {"task": ["seed=0"], "hydra": []},
                "sweeper": {"_target_": "hydra._internal.BasicSweeper"},
                "launcher": {"_target_": "hydra._internal.BasicLauncher"},
            }
        }
    )
    folder = RunFolder(tmp_path / "swept")
    with pytest.raises(KeyboardInterrupt), closing_sweep():
        launched_sweep.begin(cfg)
        assert not folder.sweep_is_dead()
        launched_sweep.folder = None
        raise KeyboardInterrupt
    assert folder.sweep_is_dead() and not list(folder.path.glob(".launch*"))


def test_a_run_that_was_killed_before_its_first_update_is_closed_and_a_held_one_is_not(
    tmp_path: Path, store: Store
) -> None:
    """Its folder has no summary yet."""
    folders = [RunFolder(tmp_path / name) for name in ("dead", "held", "gone")]
    ids = [store.create_run(None, {"accumexp.folder": str(folder.path)}) for folder in folders]
    for folder in folders[:2]:
        folder.path.mkdir()
        (folder.path / ".summary.json.partial").touch()
    with folders[1].hold_alone("resume"):
        store.close_dead_runs()
        statuses = [store.client.get_run(run_id).info.status for run_id in ids]
        partial = [folder.path.name for folder in folders if any(folder.path.glob(".*.partial"))]
    assert statuses == ["KILLED", "RUNNING", "RUNNING"]
    assert partial == []
