"""`python -m accumexp.report` and the report at a sweep's end, on sweeps that really ran."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..support.command import Case, Done, Record, only_sweep, records, run_many

SMALL = [
    "model=mlp",
    "trainer.epochs=2",
    "data.batch_size=100",
    "data.image_size=8",
    "report.margin=50",
    "tracking.system_metrics=false",
]
WRONG = "+callbacks.wrong._target_=tests.support.wrong_windows"


def sweep(seeds: str, *others: str) -> list[str]:
    return ["-m", "accum.steps=1,8", f"seed={seeds}", *SMALL, *others]


@dataclass(frozen=True)
class Ran:
    """A sweep that ran, and what of it is there."""

    base: Path
    done: Done

    @property
    def folder(self) -> Path:
        return only_sweep(self.base)

    @property
    def parent(self) -> Record:
        return next(record for record in records(self.base) if "mlflow.parentRunId" not in record.tags)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    base = tmp_path_factory.mktemp("report")
    lines = {
        "right": sweep("0,1,2"),
        "half rate": sweep("0,1,2", f"{WRONG}.HalfRate"),
        "mean of means": sweep("0,1", f"{WRONG}.MeanOfMeans"),
        "failing": ["-m", "accum.steps=1,0", "seed=0", *SMALL],
        "untracked": ["-m", "accum.steps=1,2", "seed=0,1", *SMALL, "tracking=none"],
        "single": ["accum.steps=2", *SMALL],
    }
    done = run_many([Case("run", line, str(base / name)) for name, line in lines.items()], base / "scratch")
    return {name: Ran(base / name, one) for name, one in zip(lines, done, strict=True)}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_right_window_is_equivalent(ran: dict[str, Ran]) -> None:
    right = ran["right"]
    assert right.done.code == 0, right.done
    assert (
        "accum.steps=8 is equivalent to accum.steps=1: test accuracy within 50 points." in right.done.stdout
    )
    (reference, eight) = rows_of(right.folder / "report" / "groups.csv")
    assert (reference["verdict"], eight["verdict"]) == ("reference", "equivalent")
    assert eight["same_training"] == "True" and eight["pairs"] == "3" and eight["margin"] == "50.0"
    assert float(eight["activation_mib"]) < float(reference["activation_mib"]) / 4


@pytest.mark.parametrize("wrong", ["half rate", "mean of means"])
def test_a_wrong_window_is_never_equivalent_however_wide_the_margin(ran: dict[str, Ran], wrong: str) -> None:
    done, folder = ran[wrong].done, ran[wrong].folder
    assert done.code == 0, done
    assert "accum.steps=8 is different from accum.steps=1." in done.stdout
    assert "another training: its loss leaves the reference's at update" in done.stdout
    (_, eight) = rows_of(folder / "report" / "groups.csv")
    assert eight["verdict"] == "different" and eight["same_training"] == "False"
    assert float(eight["p_equivalent_corrected"]) < 0.05  # by accuracy alone it would have been equivalent


def test_the_page_needs_nothing_but_itself(ran: dict[str, Ran]) -> None:
    folder = ran["right"].folder / "report"
    html = (folder / "report.html").read_text()
    assert not re.search(r"<script|https?://[^\s\"<]*\.(js|css|png|svg)|src=\"(?!data:)|<link", html)
    assert html.count('src="data:image/png;base64,') == 3
    for name in ("accuracy.png", "loss.png", "cost.png"):
        assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "doi:10.1007/BF01068419" in html and "python -m accumexp.run" not in html.partition("<pre>")[0]
    assert html.count("<tr>") == 6  # two tables of a heading and two groups


def test_the_parent_holds_the_report(ran: dict[str, Ran]) -> None:
    parent = ran["right"].parent
    assert {"report/report.html", "report/accuracy.png", "report/loss.png", "report/cost.png"} <= set(
        parent.artifacts
    )
    assert {"report/groups.csv", "report/jobs.csv"} <= set(parent.artifacts)
    assert parent.tags["accumexp.verdict"] == "equivalent"
    assert json.loads(parent.tags["accumexp.verdicts"]) == {"accum.steps=8": "equivalent"}
    assert parent.tags["mlflow.note.content"].startswith("**accum.steps=8 is equivalent")
    children = [record for record in records(ran["right"].base) if record is not parent and record.params]
    finals = [
        record.points["final/accuracy"][0][1] for record in children if record.params["accum.steps"] == "8"
    ]
    assert parent.points["final/accuracy/accum.steps 8"] == [(0, pytest.approx(sum(finals) / 3))]
    assert parent.points["final/accuracy_difference/accum.steps 8"]


def test_jobs_are_listed_each_once_with_what_they_measured(ran: dict[str, Ran]) -> None:
    rows = rows_of(ran["right"].folder / "report" / "jobs.csv")
    assert sorted((row["accum.steps"], row["seed"]) for row in rows) == [(s, k) for s in "18" for k in "012"]
    assert {row["status"] for row in rows} == {"FINISHED"}
    assert all(0 < float(row["final/accuracy"]) <= 1 for row in rows)


def test_failed_jobs_are_left_out_and_said_to_be(ran: dict[str, Ran]) -> None:
    failing = ran["failing"]
    assert failing.done.code == 1
    assert re.search(r"left out: accum.steps=0 .*FAILED: accum.steps=0: at least 1", failing.done.stdout)
    assert "accum.steps=0: at least 1" in (failing.folder / "report" / "report.html").read_text()
    assert json.loads(failing.parent.tags["accumexp.refused"])[0]["error"] == "accum.steps=0: at least 1"


def test_a_sweep_without_tracking_is_reported_from_its_folder(ran: dict[str, Ran]) -> None:
    untracked = ran["untracked"]
    assert untracked.done.code == 0, untracked.done
    assert not (untracked.base / "mlflow.db").exists()
    (reference, two) = rows_of(untracked.folder / "report" / "groups.csv")
    assert two["same_training"] == "True" and reference["verdict"] == "reference"


# The command -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(ran: dict[str, Ran], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the report of a sweep goes of which one job is made to look as if it was still running."""
    from mlflow import MlflowClient

    runs = [one for one in records(ran["half rate"].base) if one.params.get("accum.steps") == "8"]
    MlflowClient(f"sqlite:///{ran['half rate'].base}/mlflow.db").update_run(runs[0].run_id, status="RUNNING")
    return tmp_path_factory.mktemp("half")


@pytest.fixture(scope="module")
def asked(ran: dict[str, Ran], half: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Reports asked for after the fact."""
    right, scratch = ran["right"], tmp_path_factory.mktemp("asked")
    base, elsewhere = str(right.base), scratch / "elsewhere"
    elsewhere.mkdir()
    (scratch / "none").mkdir()
    single = str(next((ran["single"].base / "outputs").glob("*/*")))
    child = next(record for record in records(right.base) if "mlflow.parentRunId" in record.tags)
    uri = f"tracking.uri=sqlite:///{right.base}/mlflow.db"
    lines = {
        "newest": ([], base),
        "stricter": (
            [f"sweep={right.folder}", "report.margin=0.0001", f"folder={scratch}/stricter"],
            str(elsewhere),
        ),
        "by id": ([f"sweep={right.parent.run_id}", uri, f"folder={scratch}/by-id"], str(elsewhere)),
        "by job": ([f"sweep={child.run_id}", f"folder={scratch}/by-job", "report.metric=loss"], base),
        "half done": ([f"folder={half}"], str(ran["half rate"].base)),
        "no store": ([], str(scratch / "none")),
        "no sweep": ([f"sweep={scratch}/none"], base),
        "no folder": (["sweep=multirun/never"], base),
        "no such run": (["sweep=0123"], base),
        "single run's folder": ([f"sweep={single}"], base),
        "unknown key": (["sweeps=x"], base),
        "unknown setting": (["report.margins=2"], base),
    }
    done = run_many([Case("report", line, folder) for line, folder in lines.values()], scratch / "scratch")
    return dict(zip(lines, done, strict=True))


def test_the_newest_sweep_is_reported_if_none_is_named(asked: dict[str, Done], ran: dict[str, Ran]) -> None:
    assert asked["newest"].code == 0, asked["newest"]
    assert "accum.steps=8 is equivalent to accum.steps=1" in asked["newest"].stdout
    assert str(ran["right"].folder / "report" / "report.html") in asked["newest"].stdout


@pytest.mark.parametrize("how", ["by id", "by job"])
def test_a_sweep_is_found_by_its_id_or_a_jobs(asked: dict[str, Done], how: str) -> None:
    assert asked[how].code == 0, asked[how]
    assert ("test loss" if how == "by job" else "test accuracy") in asked[how].stdout


def test_another_margin_is_another_verdict(asked: dict[str, Done]) -> None:
    done = asked["stricter"]
    assert done.code == 0, done
    assert "margin of 0.0001 points" in done.stdout or "within 0.0001 points" in done.stdout
    assert "within 50 points" not in done.stdout


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no store", "sweep: there is no mlflow.db in .*give sweep=<folder or parent run id>"),
        ("no sweep", "sweep=.*none: no sweep has been run in this folder"),
        ("no folder", "sweep=multirun/never: no such folder"),
        ("no such run", "sweep=0123: no such folder, and no such run in sqlite"),
        ("single run's folder", "sweep=.*: is a single run's folder"),
        ("unknown key", "sweeps: no such key, a report has sweep, "),
        ("unknown setting", "report.margins: no such key, did you mean report.margin"),
    ],
)
def test_what_cannot_be_reported_is_said_in_a_line(asked: dict[str, Done], how: str, says: str) -> None:
    assert re.match(says, asked[how].error()), asked[how].stderr


def test_a_sweep_that_is_half_done_is_reported_as_far_as_it_is(asked: dict[str, Done], half: Path) -> None:
    done = asked["half done"]
    assert done.code == 0, done
    (_, eight) = rows_of(half / "groups.csv")
    assert eight["pairs"] == "2"
    assert re.search(r"left out: accum.steps=8 seed=\d .*: RUNNING", done.stdout)
