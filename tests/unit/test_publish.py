"""Where a report goes: pictures, page, CSV, and names and texts of a size that MLflow takes."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from accumexp.report import publish, tables
from accumexp.report.analysis import Report
from accumexp.report.page import page
from accumexp.report.pictures import draw
from accumexp.report.publish import metrics, note, tags, write
from accumexp.report.statistics import compare_pairs
from accumexp.report.tables import Table, all_tables, terminal_tables
from accumexp.report.wording import conclusion, signed_interval

from ..support.past_sweeps import job, over_steps, reported, sweep

STRANGE = "<script>alert('x')</script> & \"q\", é|ü"


@pytest.fixture(scope="module")
def crowd() -> Report:
    """60 groups with long names, and as many jobs that were refused."""
    long = "x" * 250
    jobs = [
        job(f"+model.name=/{long}/{number}/[a]", f"seed={seed}", final={"accuracy": 0.9, "update_ms": 5.0})
        for number in range(60)
        for seed in (0, 1)
    ]
    refused = [job(f"+model.name=no-{number}", status="FAILED") for number in range(60)]
    refused = [type(one)(**{**vars(one), "run_id": None, "error": "no " * 100}) for one in refused]
    return reported(sweep(*jobs, *refused))


def test_what_goes_to_mlflow_is_of_a_size_and_form_it_takes(crowd: Report) -> None:
    from mlflow.utils.validation import MAX_TAG_VAL_LENGTH, _validate_metric_name

    published = metrics(crowd)
    assert len(published) == 60 * 3 + 59  # accuracy, its deviation, time; and the differences to the first
    for name in published:
        _validate_metric_name(name)
        assert len(name) <= 250
    written = tags(crowd)
    assert all(len(value) <= MAX_TAG_VAL_LENGTH for value in written.values())
    assert json.loads(written["accumexp.verdicts"]) and json.loads(written["accumexp.refused"])[0]["error"]
    assert written["mlflow.note.content"].endswith("the page has it all")


def test_many_groups_with_long_names_are_drawn(crowd: Report, tmp_path: Path) -> None:
    written = write(crowd, tmp_path / "deep" / "folder")
    assert {path.name for path in written} == {
        *("report.html", "groups.csv", "jobs.csv", "accuracy.png", "cost.png"),
    }


class Seen(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_users_write_is_text_on_the_page_and_whole_in_the_csv(tmp_path: Path) -> None:
    jobs = [
        job(f"+tracking.tags.x={value}", f"seed={seed}", final={"accuracy": 0.9 + 0.01 * seed})
        for value in (STRANGE, "plain")
        for seed in range(3)
    ]
    report = reported(sweep(*jobs, job(f"model={STRANGE}", status="FAILED")))
    shown = Seen()
    shown.feed(page(report, {}))
    assert "script" not in shown.tags and STRANGE in shown.text
    write(report, tmp_path)
    with (tmp_path / "groups.csv").open(newline="") as file:
        assert {row["tracking.tags.x"] for row in csv.DictReader(file)} == {STRANGE, "plain"}
    assert "é\\|ü" in note(report)


def test_a_table_of_markdown_keeps_its_columns() -> None:
    assert Table(1, ["a", "b"], [["1|2", "3"]]).markdown() == "| a | b |\n| --- | --- |\n| 1\\|2 | 3 |"


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    def loss(steps: int, update: int) -> float:
        return 2.0 / update + 1e-8 * steps

    assert set(draw(reported(over_steps(lambda k, s: 0.9 + 0.01 * s, loss=loss)), tmp_path)) == {
        *("accuracy", "loss", "cost"),
    }
    assert set(draw(reported(over_steps(lambda k, s: 0.9)), tmp_path)) == {"accuracy", "cost"}
    alone = reported(sweep(job("seed=0", final={"accuracy": 0.9}, losses=[2.0, 1.0])))
    assert set(draw(alone, tmp_path)) == {"accuracy", "loss"}
    assert draw(reported(sweep(job("seed=0", status="FAILED"))), tmp_path) == {}
    lost = [
        job(f"accum.steps={k}", f"seed={s}", final={"accuracy": float("nan")}) for k in (1, 2) for s in (0, 1)
    ]
    assert set(draw(reported(sweep(*lost)), tmp_path)) == {"accuracy"}


@pytest.mark.parametrize(
    ("width", "spared"), [(None, set()), (200, set()), (95, {"p"}), (80, {"p", "training"})]
)
def test_a_narrow_terminal_loses_details_and_keeps_the_verdict(width: int | None, spared: set[str]) -> None:
    report = reported(over_steps(lambda k, s: 0.9 + 0.01 * s))
    first, _ = terminal_tables(report, width)
    headings = [str(column.header) for column in first.columns]
    assert {"p", "training"} - set(headings) == spared
    printed = Console(width=width or 200, record=True, file=io.StringIO())
    printed.print(first)
    text = printed.export_text()
    assert text.count("undecided") == 2 and "…" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_table_of_a_terminal_names_its_groups_and_cuts_no_cell(width: int) -> None:
    costs = {"update_ms": 1234.5, "samples_per_second": 12345.0, "activation_mib": 81.5, "seconds": 4321.0}
    final = {"accuracy": 0.9, "peak_memory_mib": 245.25, **costs}
    jobs = [job(f"accum.steps={k}", f"seed={s}", final=final) for k in (10, 2000) for s in (0, 1)]
    report = reported(sweep(*jobs))
    text = ""
    for table in terminal_tables(report, width):
        printed = Console(width=width, record=True, file=io.StringIO())
        printed.print(table)
        text += (lines := printed.export_text())
        assert lines.split()[0] == "accum.steps" and all(len(line) <= width for line in lines.splitlines())
        assert [line.split()[0] for line in lines.splitlines() if line.strip()][2:4] == ["10", "2000"]
    assert "…" not in text
    text = " ".join(text.split())
    for table in all_tables(report):
        for heading, *cells in zip(table.columns, *table.rows, strict=True):
            assert heading in text
            if heading not in table.optional:
                assert all(cell in text for cell in cells)


def test_a_printed_command_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(width=60, force_terminal=True, no_color=True, file=io.StringIO())
    for module in (publish, tables):
        monkeypatch.setattr(module, "console", terminal)
    publish.print_report(reported(over_steps(lambda k, s: 0.9 + 0.001 * s)))
    text = terminal.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "shown by python -m accumexp.prove accum.steps=4 seed=0\n" in text


def test_what_rounds_to_zero_has_no_minus_sign() -> None:
    metric = reported(over_steps(lambda k, s: 0.9)).metric
    tiny = compare_pairs([-1e-6, 1e-6, -1e-6], 0.5)
    assert signed_interval(tiny, metric) == "+0.00 [+0.00, +0.00]"
    lost = compare_pairs([-2e-6], 0.5)
    assert signed_interval(lost, metric) == "+0.00 (one pair)"


def test_groups_that_lack_seeds_are_named() -> None:
    jobs = [job(f"accum.steps={k}", f"seed={s}", final={"accuracy": 0.9}) for k in (1, 2, 4) for s in (0, 1)]
    failed = job("accum.steps=4", "seed=2", status="FAILED")
    text = conclusion(reported(sweep(*jobs, failed)))
    assert text.endswith("Not all seeds of accum.steps=4 finished; only those that did are compared.")


def test_brackets_in_a_value_are_no_markup() -> None:
    jobs = [job(f"model.act={act}", "seed=0", final={"accuracy": 0.9}) for act in ("[relu,tanh]", "[/x]")]
    printed = Console(width=200, record=True, file=io.StringIO())
    for table in terminal_tables(reported(sweep(*jobs))):
        printed.print(table)
    text = printed.export_text()
    assert "[relu,tanh]" in text and "[/x]" in text


def test_the_parents_metrics_are_in_the_unit_of_the_jobs() -> None:
    published = metrics(reported(over_steps(lambda k, s: 0.9 + 0.01 * k + 0.001 * s)))
    assert published["final/accuracy/accum.steps 4"] == pytest.approx(0.942)
    assert published["final/accuracy_difference/accum.steps 4"] == pytest.approx(0.03)
