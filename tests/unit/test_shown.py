"""What a person reads of a run: the bar, the lines, the summary's units, and the console command."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from accumexp import cli
from accumexp.environment.console import amount, console, print_line, result, scores, show_values
from accumexp.environment.ranks import RankInfo
from accumexp.errors import TrainingError
from accumexp.run import job
from accumexp.tracking.links import link, local_folder
from accumexp.tracking.run_folder import RunFolder
from accumexp.training import progress_display
from accumexp.training.progress_display import LossMonitor, ProgressBar, line

from ..support.experiments import composed, trainer_of

VALUES = {
    "train/loss": 0.0876,
    "train/accuracy": 0.977,
    "train/lr": 0.05,
    "eval/accuracy": 0.965,
    "eval/f1": 0.91234,
    "perf/update_ms": 10.0,
}


def test_the_monitored_metric_is_shown_after_the_loss() -> None:
    assert line(VALUES, "eval/f1").startswith("loss 0.0876  eval f1 0.9123  accuracy 0.977")
    assert line(VALUES).startswith("loss 0.0876  eval accuracy 0.965  accuracy 0.977  lr 0.05")
    final = {"accuracy": 0.9, "mae": 2.5, "loss": 0.25, "updates": 400.0, "seconds": 12.0}
    assert scores(final, "eval/mae") == "test accuracy 0.9000, test mae 2.5000, test loss 0.2500"
    assert result(final) == "test accuracy 0.9000, test loss 0.2500, 400 updates in 12.0 s"
    assert scores({"loss": 31234.5}, "eval/loss") == "test loss 3.123e+04"
    callbacks = composed("metrics=none").callbacks
    assert callbacks["progress"]["monitor"] == callbacks["monitor"]["monitor"] == "eval/loss"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    narrow = Console(file=shown, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(progress_display, "console", narrow)
    bar = ProgressBar(show=True)
    trainer: Any = SimpleNamespace(
        total_updates=330,
        progress=SimpleNamespace(update=100, epoch=9),
        options=SimpleNamespace(epochs=30),
        title="",
    )
    bar.run_begin(trainer)
    bar.epoch_begin(trainer)
    bar.logged(trainer, VALUES)
    bar.run_end(trainer)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue()).replace("\r", "\n")
    last = [text for text in plain.splitlines() if "100/330" in text][-1]
    assert len(last) <= width
    for part in ("10/30", "100/330", "loss 0.0876", "eval accuracy 0.9"):
        assert part in last
    assert ("updates/s" in last) == (width == 120)


def test_without_progress_nothing_is_printed_in_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = trainer_of("trainer.max_updates=4", "trainer.log_every=2")
    trainer.callbacks["monitor"] = LossMonitor(every=2, show=False)
    trainer.fit()
    assert not capsys.readouterr().out
    callbacks = composed("trainer.progress=false").callbacks
    assert callbacks["progress"]["show"] is callbacks["monitor"]["show"] is False


def test_what_is_printed_is_in_the_log_and_not_printed_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(), logging.FileHandler(tmp_path / "log")])
    monkeypatch.setattr(root, "level", logging.INFO)
    logging.getLogger("accumexp").manager._clear_cache()  # pyright: ignore
    console.print("[bold]a line[/bold]")
    print_line("x=[1,2]", markup=False)
    show_values("summary", {"best model": "0.9\n/a/path"})
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines == ["a line", "x=[1,2]", "summary", "  best model  0.9", "              /a/path"]
    printed = capsys.readouterr()
    assert printed.out.splitlines() == lines and not printed.err
    root.handlers[1].close()


def test_a_failing_job_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded: list[Any] = []
    failing: Any = SimpleNamespace(
        title="job 3 accum.steps=4", alone=False, record_failure=lambda *given: recorded.append(given)
    )
    error = TrainingError("no luck\nat all")
    job._fail(error, failing, RunFolder(tmp_path), RankInfo(), resumed=False)
    assert capsys.readouterr().out == "job 3 accum.steps=4: failed: no luck\n"
    assert recorded == [(RunFolder(tmp_path), error)]


def test_the_peak_of_tensors_falls_with_the_micro_batch() -> None:
    peaks = []
    for steps in (1, 8):
        trainer, memory = trainer_of(f"accum.steps={steps}", "trainer.max_updates=2", "trainer.log_every=1")
        trainer.fit()
        peaks.append(trainer.latest["perf/peak_memory_mib"] * 2**20)
        parameters = sum(parameter.nbytes for parameter in trainer.model.parameters())
        # Weights, gradients, and the momentum of each.
        assert peaks[-1] == pytest.approx(3 * parameters + trainer.progress.activation_bytes)
    assert peaks[1] < peaks[0]
    assert amount(96.5 * 1024) == "96.5 KiB"


def test_the_console_command_is_the_modules(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[Any] = []
    paths: list[str] = []

    def run_module(name: str, **options: Any) -> None:
        called.append((name, options["alter_sys"]))
        paths.append(sys.path[0])

    monkeypatch.setattr("runpy.run_module", run_module)
    monkeypatch.setattr("sys.argv", ["accumexp", "prove", "accum.steps=4"])
    before = list(sys.path)
    cli.main()
    assert paths == [os.getcwd()] and sys.path == before
    assert called == [("accumexp.prove", True)] and cli.sys.argv[1:] == ["accum.steps=4"]
    monkeypatch.setattr("sys.argv", ["accumexp", "-sc", "query=bash"])
    monkeypatch.setenv("COMP_LINE", "accumexp plan model=re")
    cli.main()
    assert called[1:] == [("accumexp.plan", False)] and cli.os.environ["COMP_LINE"] == "accumexp model=re"
    monkeypatch.setattr("sys.argv", ["accumexp", "-sc", "query=bash"])
    monkeypatch.setenv("COMP_LINE", "accumexp pl")
    cli.main()
    assert capsys.readouterr().out == "run evaluate report prove plan audit\n"
    monkeypatch.setattr("sys.argv", ["accumexp", "train"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err.startswith("error: train: no such command\nusage: accumexp {run,")


def test_a_command_whose_reader_has_ended_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        with pytest.raises(SystemExit, match="^1$"):
            cli.command(lambda: print("help"))
    assert capsys.readouterr().err == ""


def test_hydra_completes_choices_and_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accumexp.run.command import task

    monkeypatch.setattr("sys.argv", ["accumexp", "-sc", "query=bash"])
    monkeypatch.setenv("COMP_LINE", "accumexp model=res")
    cli.hydra_app(task)
    assert capsys.readouterr().out.split() == ["model=resnet18", "model=resnet50"]


def test_the_choices_of_own_files_are_completed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from accumexp.run.command import task

    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "tanks.yaml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("runpy.run_module", lambda name, **options: cli.hydra_app(task))
    for typed, offered in ("conf experiment=ta", ["experiment=tanks"]), ("nowhere model=mlp", ["model=mlp"]):
        monkeypatch.setattr("sys.argv", ["accumexp", "-sc", "query=bash"])
        monkeypatch.setenv("COMP_LINE", f"accumexp run --config-dir {typed}")
        cli.main()
        assert capsys.readouterr().out.split() == offered


def test_a_link_is_the_same_file_and_none_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    for _ in range(2):
        assert link(tmp_path / "a", tmp_path / "made" / "b")
    assert (tmp_path / "made" / "b").samefile(tmp_path / "a")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["b"]
    assert not link(tmp_path / "nothing", tmp_path / "c")
    assert local_folder("file:///a%20b/c") == Path("/a b/c")
    assert local_folder("mlflow-artifacts:/1/c") is None and local_folder("file://elsewhere/c") is None
