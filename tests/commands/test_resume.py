"""Law 8: a run that was stopped or killed goes on to the bits of one that never was."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from accumexp.training.checkpoint import find, load

from ..support.command import Done, Record, ranked_models, record_of, run_command
from ..support.experiments import UPDATES_AN_EPOCH
from ..support.same_run import STATEFUL, differences, doubled, points, rows, state
from ..support.trouble import trouble

UPDATES = 3 * UPDATES_AN_EPOCH


@dataclass(frozen=True)
class Stopped:
    """How a run was stopped and what came of it before and after `resume=`."""

    how: Stop
    folder: Path
    first: Done
    status_between: str
    second: Done
    record: Record


@dataclass(frozen=True)
class Stop:
    """A signal after an update, the exit code it leads to and the status MLflow has then."""

    name: str
    at: int
    code: int
    status: str
    options: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} after update {self.at}"


STOPS = [
    # What is kept when it stops is kept when it ends, too.
    Stop("SIGTERM", 15, 143, "KILLED", ("callbacks.checkpoint.keep_last=4",)),
    Stop("SIGTERM", 2 * UPDATES_AN_EPOCH, 143, "KILLED"),
    # All is trained, and the last epoch is still to be evaluated.
    Stop("SIGTERM", UPDATES, 143, "KILLED"),
    # The newest checkpoint is of update 15, and the points of update 16 are in MLflow already.
    Stop(
        "SIGKILL",
        18,
        -signal.SIGKILL,
        "RUNNING",
        ("callbacks.checkpoint.every_updates=5", "tracking.flush_points=1"),
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs here: a store is made once."""
    folder = tmp_path_factory.mktemp("resume")
    return folder


def run_to(base: Path, folder: str, how: Stop | None = None) -> Done:
    arguments = [*STATEFUL, f"hydra.run.dir={folder}"]
    if how:
        arguments += [trouble(how.name, how.at, mark=base / f"{folder}.mark"), *how.options]
    return run_command("run", *arguments, folder=base)


@pytest.fixture(scope="module")
def never_stopped(base: Path) -> Path:
    done = run_to(base, "never_stopped")
    assert done.code == 0, done
    return base / "never_stopped"


@pytest.fixture(scope="module", params=STOPS, ids=str)
def stopped(request: pytest.FixtureRequest, base: Path) -> Stopped:
    how: Stop = request.param
    folder = base / f"{how.name}_{how.at}"
    first = run_to(base, folder.name, how)
    between = record_of(folder).status
    second = run_command("run", f"resume={folder.name}", "trust=[tests]", folder=base)
    return Stopped(how, folder, first, between, second, record_of(folder))


def test_differences_sees_a_single_bit() -> None:
    weight = torch.ones(3)
    assert differences({"a": [weight, 1.0]}, {"a": [weight.clone(), 1.0]}) == []
    assert differences({"a": [weight]}, {"a": [torch.nextafter(weight, 2 * weight)]}) == ["/a/0"]
    assert differences({"a": 1}, {"b": 1}) and differences([1], [1, 2]) and differences(1, 1.0)


def test_law_8_a_stopped_run_ends_as_its_signal_says_and_the_resumed_one_finishes(stopped: Stopped) -> None:
    how = stopped.how
    assert stopped.first.code == how.code, stopped.first
    assert stopped.status_between == how.status
    assert stopped.second.code == 0, stopped.second
    assert stopped.record.status == "FINISHED"
    if how.name != "SIGKILL":
        assert f"stopped by {how.name} after update {how.at}" in stopped.first.stdout
        assert f"python -m accumexp.run resume={stopped.folder}" in stopped.first.stdout


def test_law_8_a_resumed_run_has_the_bits_of_one_never_stopped(never_stopped: Path, stopped: Stopped) -> None:
    one, other = state(never_stopped), state(stopped.folder)
    assert {"model", "optimizer", "scheduler", "callbacks", "random", "progress", "evaluated"} <= one.keys()
    assert one["callbacks"]["ema"]["n_averaged"] == UPDATES
    assert differences(one, other) == []


def test_law_8_a_resumed_runs_best_checkpoint_is_that_of_one_never_stopped(
    never_stopped: Path, stopped: Stopped
) -> None:
    one, other = (load(find(run, best=True)) for run in (never_stopped, stopped.folder))
    assert differences(one["model"], other["model"]) == []
    assert differences(one["evaluated"], other["evaluated"]) == []


def test_law_8_a_resumed_runs_journal_is_that_of_one_never_stopped(
    never_stopped: Path, stopped: Stopped
) -> None:
    expected = rows(never_stopped)
    assert [row["update"] for row in expected if "train/loss" in row] == list(range(1, UPDATES + 1))
    assert rows(stopped.folder) == expected


def test_law_8_a_resumed_runs_points_are_those_of_one_never_stopped(
    never_stopped: Path, stopped: Stopped
) -> None:
    expected = points(record_of(never_stopped))
    assert {"train/loss", "eval/loss", "eval/ema_accuracy", "final/ema_loss"} <= expected.keys()
    assert points(stopped.record) == expected


def test_law_8_a_resumed_run_doubles_no_point(stopped: Stopped) -> None:
    assert doubled(stopped.record) == []
    assert [step for step, _ in stopped.record.points["perf/update_ms"]] == [*range(4, UPDATES, 4), UPDATES]


def test_law_8_a_resumed_run_doubles_no_logged_model(stopped: Stopped, base: Path) -> None:
    names = [name for name, _ in ranked_models(base, stopped.record)]
    assert f"update-{UPDATES}" in names
    assert sorted(set(names)) == sorted(names)


def test_sigint_stops_after_the_update_with_exit_code_130(base: Path) -> None:
    done = run_to(base, "interrupted", Stop("SIGINT", 5, 130, "KILLED", ("tracking=none",)))
    assert done.code == 130, done
    assert "stopped by SIGINT after update 5" in done.stdout
    assert not done.stderr
    assert load(find(base / "interrupted"))["progress"]["update"] == 5
