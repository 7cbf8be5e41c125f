"""Law: what a store did not get of a run is sent later, once, by `sync=` or by a resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from accumexp.errors import TrainingError, UsageError
from accumexp.report import __main__ as report
from accumexp.tracking import MLflowTracker, reopen, sender
from accumexp.tracking.outbox import Outbox
from accumexp.tracking.resend import send_unsent, unsent_runs
from accumexp.tracking.run_folder import RunFolder, RunStatus

from ..support.stores import LONG, Faults, config_at, history, log_losses, losses, opened, until

pytestmark = pytest.mark.usefixtures("impatient")


def left(folder: Path, mode: str = "refuse") -> MLflowTracker:
    """A run of which the store got the first two of five points."""
    tracker = opened(folder, flush_points=1)
    faults = Faults(tracker.store)
    log_losses(tracker, 2)
    until(lambda: len(history(tracker, "train/loss")) == 2)
    faults.mode = mode
    log_losses(tracker, 3, first=3)
    tracker.log(5, {"eval/accuracy": 0.5})
    tracker.final({"loss": 0.5})
    tracker.tag({"accumexp.error": "none"})
    checkpoint = folder / "run" / "checkpoints" / "update-00000005.pt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"weights")
    tracker.checkpoint(checkpoint, 5, {"eval/accuracy": 0.5})
    tracker.end(RunStatus.FINISHED)
    faults.mode = None
    return tracker


def everything_is_there(tracker: MLflowTracker) -> None:
    assert tracker.run_id
    client = tracker.store.client
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.data.tags["accumexp.error"] == "none"
    assert history(tracker, "train/loss") == losses(5)
    assert history(tracker, "final/loss") == [(0, 0.5)]
    assert history(tracker, "eval/accuracy") == [(5, 0.5)]
    assert [file.path for file in client.list_artifacts(tracker.run_id, "checkpoints")] == [
        "checkpoints/update-00000005.pt"
    ]
    (model,) = client.search_logged_models([tracker.store.experiment_id])
    assert model.name == "update-5" and model.tags["accumexp.checkpoint"] == "checkpoints/update-00000005.pt"


@pytest.mark.parametrize("mode", ["refuse", "lose"])
def test_what_is_left_is_sent_once_by_sync(
    folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = left(folder, mode)
    (folder / "run").rename(folder / "moved")
    for text in ("5 points, 1 tags, 1 files, 1 logged models and the end", "nothing is left to send"):
        monkeypatch.setattr("sys.argv", ["report", f"sync={folder}"])
        report.main()
        out = " ".join(capsys.readouterr().out.split())
        assert text in out or mode == "lose" and "the end" in out
    everything_is_there(tracker)
    assert not list(folder.rglob("unsent.jsonl"))


def test_sync_goes_on_where_it_was_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = left(folder)
    (run,) = unsent_runs(folder)
    stopped = tracker.store.client
    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient.finalize_logged_model", lost_after(1))
        with pytest.raises(TrainingError, match="1 logged models of run .* cannot be sent"):
            send_unsent(run)
    send_unsent(run)
    assert stopped is tracker.store.client
    everything_is_there(tracker)


def lost_after(calls: int) -> Callable[..., None]:
    made: list[int] = []

    def call(*arguments: object, **named: object) -> None:
        made.append(1)
        if len(made) >= calls:
            raise ConnectionError("gone")

    return call


def test_sync_names_what_it_cannot_use(folder: Path) -> None:
    left(folder)
    run = RunFolder(folder / "run")
    with pytest.raises(UsageError, match="sync=.*nowhere: no such folder"):
        unsent_runs(folder / "nowhere")
    with run.hold_alone("resume"), pytest.raises(UsageError, match=r"sync=.*process \d+ works on this run"):
        send_unsent(run)
    (folder / "other").mkdir()
    with pytest.raises(
        TrainingError, match="does not take run .*give the store that has it with tracking.uri"
    ):
        send_unsent(run, f"sqlite:///{folder / 'other' / 'mlflow.db'}")
    assert run.unsent.exists()


def test_a_resumed_run_sends_what_was_left_and_doubles_no_point(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = left(folder)
    monkeypatch.setattr(sender, "DATABASE_PATIENCE", LONG)
    run = RunFolder(folder / "run")
    with run.unsent.open("a") as file:
        file.write('{"points": [["train/loss"')  # as a kill leaves it
    again = reopen(config_at(folder), tracker.identity(), folder=run)
    assert isinstance(again, MLflowTracker)
    log_losses(again, 4, first=4)
    assert again.store.client.get_run(again.run_id).info.status == "RUNNING"
    again.end(RunStatus.FINISHED)
    assert history(again, "train/loss") == losses(7)
    assert not run.unsent.exists()
    assert len(again.store.client.search_logged_models([again.store.experiment_id])) == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("[1]\n", "is damaged"),
        ("{\n", "is damaged"),
        ('{"uri": "sqlite:///a", "experiment_id": "1"}\n', "is damaged"),
        ('IDENTITY\n{"points": 1}\n', "is damaged"),
        ('IDENTITY\n{"file": "/etc/hostname", "folder": null}\n', "outside of the run's folder"),
        ('IDENTITY\n{"file": "../secret", "folder": null}\n', "outside of the run's folder"),
    ],
)
def test_a_file_that_is_damaged_or_names_others_is_not_sent(tmp_path: Path, lines: str, message: str) -> None:
    identity = '{"uri": "sqlite:///mlflow.db", "experiment_id": "1", "run_id": "2"}'
    run = RunFolder(tmp_path)
    run.unsent.write_text(lines.replace("IDENTITY", identity))
    with pytest.raises(UsageError, match=message):
        send_unsent(run)


def test_credentials_are_not_sent_to_a_server_that_only_a_file_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    run = RunFolder(tmp_path)
    outbox = Outbox(run.unsent, {"uri": "http://127.0.0.1:9", "experiment_id": "1", "run_id": "2"})
    outbox.close([{"tags": {"a": "b"}}])
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_TOKEN would be sent there"):
        send_unsent(run)
