"""Certificates in the report: what the runs say of their windows, beside what the report says of accuracy."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from accumexp.proof import Certificate, Check
from accumexp.report.analysis import Report
from accumexp.report.groups import group_jobs
from accumexp.report.jobs import Sweep, from_folder
from accumexp.report.publish import note, write
from accumexp.report.tables import print_tables, result_table, terminal_tables
from accumexp.report.wording import MAX_CERTIFICATE, certificate_cell, conclusion

from ..support.past_sweeps import over_steps, reported

UP_TO = "proved up to dropout"
NOT = "not proved: bn1 (BatchNorm2d) <batch statistics over 32 of 128 samples>; bn2 & 18 more"
SENTENCE = (
    "accum.steps=4 is equivalent in test accuracy and not proved: both are true, its update is not the "
    "larger batch's."
)


def swept(**lines: list[str]) -> Sweep:
    """Five seeds of 1, 2 and 4 steps, all equivalent, with these certificates by steps ("s4") and seed."""
    jobs = over_steps(lambda steps, seed: 0.9 + 0.001 * seed + 0.0001 * ((steps * seed) % 3))
    tagged = []
    for job in jobs.jobs:
        certificates = lines.get(f"s{job.params['accum.steps']}", [])
        line = certificates[job.seed] if job.seed < len(certificates) else ""
        tagged.append(replace(job, tags={"accumexp.certificate": line} if line else {}))
    return replace(jobs, jobs=tagged)


def cells(report: Report, heading: str) -> list[str]:
    table = result_table(report)
    return [row[table.columns.index(heading)] for row in table.rows]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["proved"] * 5, "proved"),
        ([UP_TO] * 5, UP_TO),
        ([NOT] * 5, "not proved: bn1 ..."),
        (["not  proved:\n" + "x" * 99] * 5, "not proved"),
        (["proved"] * 3 + [NOT] * 2, "proved 3 of 5"),
        (["proved"] * 3, "proved 3 of 5"),  # of two nobody knows
        (["proved"] * 2 + [UP_TO] * 3, "proved 2 of 5"),
        ([NOT] * 2 + [UP_TO] * 3, "proved 0 of 5"),
        ([], ""),
    ],
    ids=str,
)
def test_a_group_says_what_all_its_runs_say(lines: list[str], expected: str) -> None:
    (_, _, four) = group_jobs(swept(s4=lines).jobs)
    assert certificate_cell(four) == expected and len(expected) <= MAX_CERTIFICATE


def test_the_column_stands_before_the_verdict_and_only_where_there_are_certificates(tmp_path: Path) -> None:
    report = reported(swept(s1=["proved"] * 5, s4=[NOT] * 5))
    assert result_table(report).columns[-2:] == ["certificate", "verdict"]
    assert cells(report, "certificate") == ["proved", "", "not proved: bn1 ..."]
    assert cells(report, "verdict") == ["reference", "equivalent", "equivalent"]
    assert "| certificate | verdict |" in note(report)
    single = reported(Sweep("", "", "", [job for job in swept(s1=["proved"] * 5).jobs[:5]]))
    assert result_table(single).columns[-1] == "certificate"
    assert result_table(single).rows[0][-1] == "proved"
    bare = reported(swept())
    assert "certificate" not in result_table(bare).columns and len(result_table(bare).rows[1]) == 7
    page, *_ = write(bare, tmp_path)
    assert "ertificate" not in page.read_text()
    assert "certificate" not in (tmp_path / "jobs.csv").read_text() + (tmp_path / "groups.csv").read_text()


@pytest.mark.parametrize(
    ("width", "gone"),
    [
        (None, set()),
        (150, set()),
        (105, {"p", "training"}),
        (90, {"p", "training", "certificate"}),
        (75, {"p", "training", "certificate", "seeds"}),
    ],
)
def test_a_narrow_terminal_loses_the_certificate_before_the_verdict(
    width: int | None, gone: set[str]
) -> None:
    report = reported(swept(s2=["proved"] * 5, s4=[NOT] * 5))
    first, _ = terminal_tables(report, width)
    headings = [str(column.header) for column in first.columns]
    assert set(result_table(report).columns) - set(headings) == gone and headings[-1] == "verdict"


def test_a_pipe_gets_the_whole_table(capsys: pytest.CaptureFixture[str]) -> None:
    report = reported(swept(s2=["proved"] * 5, s4=[NOT] * 5))
    print_tables(terminal_tables(report))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert len(max(lines, key=len)) > 120 and "…" not in "".join(lines)
    assert " ".join(lines[1].split()).startswith("accum.steps seeds")


def test_the_page_has_every_line_whole_and_as_text(tmp_path: Path) -> None:
    html = write(reported(swept(s2=["proved"] * 5, s4=[NOT] * 4)), tmp_path)[0].read_text()
    below = html.partition("</table>")[2].partition("<img")[0]
    assert "certificate of accum.steps=2 (5 of 5): <b>proved</b>" in below
    whole = "not proved: bn1 (BatchNorm2d) &lt;batch statistics over 32 of 128 samples&gt;; bn2 &amp; 18 more"
    assert f"certificate of accum.steps=4 (4 of 5): <b>{whole}</b>" in below
    assert "<batch" not in html and "<b>Certificate</b>" in html


def test_the_csv_of_jobs_has_them_by_job(tmp_path: Path) -> None:
    write(reported(swept(s2=["proved"] * 5, s4=[NOT])), tmp_path)
    with (tmp_path / "jobs.csv").open(newline="") as file:
        certificates = {(row["accum.steps"], row["seed"]): row["certificate"] for row in csv.DictReader(file)}
    assert (
        certificates[("2", "3")] == "proved"
        and certificates[("4", "0")] == NOT
        and certificates[("4", "1")] == ""
    )
    with (tmp_path / "groups.csv").open(newline="") as file:
        assert [row["certificate"] for row in csv.DictReader(file)] == ["", "proved", "proved 0 of 5"]


def test_equivalent_and_not_proved_are_both_said() -> None:
    assert conclusion(reported(swept(s2=["proved"] * 5, s4=[NOT] * 5))).endswith(SENTENCE)
    assert conclusion(reported(swept(s4=[NOT]))).endswith(SENTENCE)
    both = conclusion(reported(swept(s2=[NOT] * 5, s4=[NOT] * 5)))
    assert "accum.steps=2 and 4 are equivalent in test accuracy and not proved: both are true, their" in both
    memory = Certificate([Check("saved activations", 2.0, 1.0, "ratio", "", about="memory")]).lines[0]
    assert memory.startswith("not proved: the update is the larger batch's")
    for right in (
        swept(),
        swept(s2=["proved"] * 5, s4=[UP_TO] * 5),
        swept(s1=[NOT] * 5),
        swept(s4=[memory] * 5),
    ):
        assert "not proved" not in conclusion(reported(right))
    undecided = conclusion(reported(swept(s4=[NOT] * 5), margin=1e-6))
    assert "equivalent" not in undecided and "not proved" not in undecided


def test_a_folders_jobs_bring_theirs(tmp_path: Path) -> None:
    (tmp_path / "0_job").mkdir()
    summary = {
        "folder": str(tmp_path / "0_job"),
        "status": "FINISHED",
        "overrides": ["accum.steps=2"],
        "run_id": None,
    }
    summary["tags"] = {"accumexp.certificate": UP_TO}
    (tmp_path / "0_job" / "summary.json").write_text(json.dumps(summary))
    assert [job.certificate for job in from_folder(tmp_path).jobs] == [UP_TO]
