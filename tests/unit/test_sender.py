"""Law: a store that does not answer stops no training, and what it did not get is kept."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from accumexp.tracking import MLflowTracker, Store, reopen, sender
from accumexp.tracking.outbox import read_unsent
from accumexp.tracking.record import RunRecord
from accumexp.tracking.resend import send_unsent
from accumexp.tracking.run_folder import RunFolder, RunStatus

from ..support.stores import LONG, Faults, config_at, history, log_losses, losses, opened, until

pytestmark = pytest.mark.usefixtures("impatient")


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_points_are_sent_in_batches_and_all_of_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "DATABASE_PATIENCE", LONG)
    tracker = opened(folder, flush_points=700, flush_seconds=1e9)
    faults = Faults(tracker.store)
    log_losses(tracker, 699)
    time.sleep(0.2)
    assert faults.calls == []
    log_losses(tracker, 1, first=700)
    until(lambda: bool(faults.calls))
    log_losses(tracker, 300, first=701)
    tracker.end(RunStatus.FINISHED)
    sizes = [len(arguments[1]) for name, arguments in faults.calls if name == "log_batch"]
    assert sizes == [700, 300]
    assert history(tracker, "train/loss") == losses(1000)
    assert list((folder / "run").iterdir()) == []


@pytest.mark.parametrize("mode", ["refuse", "lose"])
def test_an_outage_is_two_lines_and_loses_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(sender, "DATABASE_PATIENCE", LONG)
    tracker = opened(folder, flush_seconds=0.0)
    faults = Faults(tracker.store)
    faults.mode = mode
    for update in range(1, 6):
        log_losses(tracker, 1, first=update)
        calls = len(faults.calls)
        until(lambda calls=calls: len(faults.calls) > calls)
    (line,) = lines_of(caplog)
    assert f"{tracker.store.uri} does not take the record (" in line and "unsent.jsonl" in line
    faults.mode = None
    until(lambda: len(lines_of(caplog)) == 2)
    assert lines_of(caplog)[1].endswith("takes the record again")
    tracker.end(RunStatus.FINISHED)
    assert history(tracker, "train/loss") == losses(5)
    assert len(lines_of(caplog)) == 2


def test_training_never_waits_for_a_store_that_hangs(
    folder: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = opened(folder, flush_seconds=0.0)
    faults = Faults(tracker.store)
    faults.mode = "hang"
    start = time.monotonic()
    log_losses(tracker, 1000)
    tracker.tag({"a": "b"})
    tracker.final({"loss": 0.5})
    (folder / "run" / "last.pt").write_text("weights")
    tracker.checkpoint(folder / "run" / "last.pt", 1000, {"eval/loss": 0.5})
    tracker.flush()
    assert time.monotonic() - start < 2
    tracker.end(RunStatus.FINISHED)
    assert time.monotonic() - start < 5
    (line,) = lines_of(caplog)
    assert "1001 points, 1 tags, 1 files, 1 logged models and the end of the run did not reach" in line
    assert line.endswith("(no answer)")
    assert capsys.readouterr().out == f"send it with\n  python -m accumexp.report sync={folder / 'run'}\n"
    faults.answering.set()


def test_back_off_counts_from_the_end_of_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "FIRST_PAUSE", 0.2)
    monkeypatch.setattr(sender, "DATABASE_PATIENCE", 5)
    tracker = opened(folder, flush_seconds=0.0)
    faults = Faults(tracker.store)
    ends: list[float] = []
    starts: list[float] = []

    def slow_failure(*arguments: object, **named: object) -> None:
        starts.append(time.monotonic())
        time.sleep(0.3)
        ends.append(time.monotonic())
        raise ConnectionError("gone")

    monkeypatch.setattr(faults, "log_batch", slow_failure, raising=False)
    log_losses(tracker, 3)
    until(lambda: len(starts) == 3)
    pauses = [start - end for start, end in zip(starts[1:], ends, strict=False)]
    assert 0.2 <= pauses[0] < 0.4 <= pauses[1]
    monkeypatch.delattr(faults, "log_batch")
    tracker.end(RunStatus.FINISHED)
    assert history(tracker, "train/loss") == losses(3)


def test_a_file_that_cannot_be_sent_holds_back_nothing_else(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = opened(folder)
    faults = Faults(tracker.store)
    faults.mode, faults.only = "refuse", "log_artifact"
    (folder / "run" / "config.yaml").write_text("a: 1")
    tracker.artifact(folder / "run" / "config.yaml")
    log_losses(tracker, 5)
    tracker.end(RunStatus.FINISHED)
    assert history(tracker, "train/loss") == losses(5)
    assert faults.get_run(tracker.run_id).info.status == "FINISHED"
    (line,) = lines_of(caplog)
    assert "1 files of the run did not reach" in line and "(gone)" in line
    faults.mode = None
    assert send_unsent(RunFolder(folder / "run")).startswith("1 files: http")


def test_the_end_after_a_second_signal_waits_only_shortly(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "DATABASE_PATIENCE", LONG)
    monkeypatch.setattr(sender, "INTERRUPTED_PATIENCE", 0.1)
    tracker = opened(folder)
    faults = Faults(tracker.store)
    faults.mode = "hang"
    log_losses(tracker, 1)

    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracker._sender._done, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tracker.end(RunStatus.FINISHED)
    start = time.monotonic()
    tracker.end(RunStatus.KILLED)
    assert time.monotonic() - start < 5
    faults.answering.set()
    statuses = [
        entry["status"] for entry in read_unsent(folder / "run" / "unsent.jsonl")[1] if "status" in entry
    ]
    assert statuses == ["FINISHED", "KILLED"]


def test_a_removed_database_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = opened(folder)
    log_losses(tracker, 1)
    tracker.flush()
    until(lambda: len(history(tracker, "train/loss")) == 1)
    (folder / "mlflow.db").unlink()
    log_losses(tracker, 1, first=2)
    tracker.end(RunStatus.FINISHED)
    lost, end = lines_of(caplog)
    assert f"the file {folder / 'mlflow.db'} was removed" in lost
    assert "1 points and the end of the run did not reach" in end


def test_a_store_that_takes_entries_slowly_is_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "DATABASE_PATIENCE", 2)
    tracker = opened(folder)
    faults = Faults(tracker.store)
    send = faults._client.set_tag

    def slow(*arguments: str) -> None:
        time.sleep(0.4)
        send(*arguments)

    monkeypatch.setattr(faults, "set_tag", slow, raising=False)
    for number in range(8):
        tracker.tag({f"tag {number}": "value"})
    tracker.end(RunStatus.FINISHED)
    assert not (folder / "run" / "unsent.jsonl").exists()


def test_the_load_of_the_machine_is_sent_too_and_goes_on_at_a_resume(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "DATABASE_PATIENCE", LONG)
    monkeypatch.setattr("accumexp.tracking.system_metrics.INTERVAL", 0.05)
    (folder / "run").mkdir()
    run, config = RunFolder(folder / "run"), config_at(folder)
    config.system_metrics = True
    store = Store(config)
    tracker = MLflowTracker(store, store.create_run(None, {}), config, folder=run)
    assert measured(tracker, 3) == [0, 1, 2]
    again = reopen(config, tracker.identity(), folder=run)
    assert isinstance(again, MLflowTracker)
    assert measured(again, 6) == [0, 1, 2, 3, 4, 5]


def measured(tracker: MLflowTracker, count: int) -> list[int]:
    """The first `count` steps of the machine's load; ends the run once it has so many."""

    def steps() -> list[int]:
        tracker.flush()
        return [step for step, _ in history(tracker, "system/cpu_utilization_percentage")]

    until(lambda: len(steps()) >= count)
    tracker.end(RunStatus.FINISHED)
    assert len(set(steps())) == len(steps())
    return steps()[:count]


def test_a_retry_that_is_given_up_loses_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = opened(folder)
    faults = Faults(tracker.store)
    faults.mode, faults.only = "refuse", "log_artifact"
    for name in ("one", "two"):
        (folder / "run" / name).write_text(name)
        tracker.artifact(folder / "run" / name)
    tracker.flush()
    until(lambda: len(tracker._sender.delivery.failed) == 2)
    faults.mode = "hang"
    tracker.end(RunStatus.FINISHED)
    faults.answering.set()
    assert [entry["file"] for entry in read_unsent(folder / "run" / "unsent.jsonl")[1]] == ["one", "two"]


def test_a_file_that_is_gone_is_a_line(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "DATABASE_PATIENCE", LONG)
    tracker = opened(folder)
    tracker.artifact(folder / "run" / "gone")
    tracker.end(RunStatus.FINISHED)
    (line,) = lines_of(caplog)
    assert line.endswith("run/gone is not there any more, and is not sent")
    assert not (folder / "run" / "unsent.jsonl").exists()


def test_a_thread_without_work_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "DATABASE_PATIENCE", LONG)
    tracker = opened(folder, flush_seconds=0.0)
    log_losses(tracker, 1)
    until(lambda: len(history(tracker, "train/loss")) == 1)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.2
    tracker.end(RunStatus.FINISHED)


def test_a_record_whose_end_is_interrupted_is_closed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = RunRecord(RunFolder(tmp_path))
    ends: list[RunStatus] = []

    def end(status: RunStatus) -> None:
        ends.append(status)
        if len(ends) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(record.tracker, "end", end)
    record.record(1, {"train/loss": 1.0}, publish=True)
    with pytest.raises(KeyboardInterrupt):
        record.close(RunStatus.FINISHED)
    record.close(RunStatus.KILLED)
    record.close(RunStatus.KILLED)
    assert ends == [RunStatus.FINISHED, RunStatus.KILLED, RunStatus.KILLED]
    assert RunFolder(tmp_path).metrics.read_text().count("\n") == 1
