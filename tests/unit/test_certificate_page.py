"""What a certificate says first: in its lines, on the terminal, on its page and in MLflow's note."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from rich.console import Console

from accumexp.config.schema import ProofConfig
from accumexp.environment import console as terminal
from accumexp.environment.ranks import RankInfo
from accumexp.proof import Cause, Certificate, Check, Counts, Series
from accumexp.prove import __main__ as command
from accumexp.prove import job, save_certificate, session, show
from accumexp.prove.pictures import BOUND, MAX_PANELS, RIGHT, WRONG, counts_figure, errors_figure
from accumexp.tracking import Store
from accumexp.tracking.run_folder import RunFolder
from accumexp.training.experiment import Experiment

from ..support.experiments import composed

STRANGE = "<script>alert('x')</script> & [bold]é|ü[/]"
DETAIL = "worst at e.weight, update 7"


def check(name: str = "gradient, fp64", figure: float = 0.25, **fields: Any) -> Check:
    return Check(name, figure, 1e-14, "relative", "rounding", **{"detail": DETAIL, **fields})


def cause(reason: str, where: str = "", **fields: Any) -> Cause:
    return Cause(
        "a source", where, reason, **{"effect": 0.25, "shown": "by this", "advice": "that", **fields}
    )


FINE = check("gradient, fp64", 1e-16)
MEMORY = Check("saved activations", 1.0, 0.375, "ratio", "one graph", "of 12 MiB", about="memory")
REDUCED = Check("gradient reductions a window", 4.0, 1.5, "count", "one", about="communication")
MADE = Check(
    "micro-batches a window", 3.0, 0.0, "count", "as asked", "steps=4 asked, 1 made", about="micro-batches"
)
DROPOUT = cause("draws depend on the split", "3 (Dropout)", excused=True)
LATE = Series("gradient", "relative", [1, 2, 3, 4], [0.0, 1e-16, 0.2, math.nan], [1e-14] * 4)


# The lines of the verdict --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checks", "causes", "lines"),
    [
        ([FINE], [], ["proved"]),
        ([FINE], [DROPOUT], ["proved up to a source (3 (Dropout))"]),
        ([check()], [cause("it is\nlost", "e.weight")], ["not proved: e.weight: it is lost"]),
        (
            [check()],
            [DROPOUT, cause("first"), cause("second"), cause("third")],
            ["not proved: first", "also: second", "also: third"],
        ),
        (
            [MEMORY],
            [],
            [
                "not proved: the update is the larger batch's, but more memory than promised: "
                "saved activations: 1 instead of at most 0.375 (of 12 MiB)"
            ],
        ),
        (
            [MADE, REDUCED],
            [DROPOUT],
            [
                "not proved: the update is the larger batch's up to a source (3 (Dropout)), but more "
                "communication than promised: gradient reductions a window: 4 instead of at most 1.5",
                "also: another number of micro-batches than asked for: steps=4 asked, 1 made",
            ],
        ),
        (  # a cause stands without a failed check: nothing is certified of the update
            [MEMORY],
            [cause("draws cannot be held fixed")],
            [
                "not proved: draws cannot be held fixed",
                "also: more memory than promised: saved activations: 1 instead of at most 0.375 (of 12 MiB)",
            ],
        ),
        (
            [MEMORY, check(), check("buffers")],
            [],
            [
                "not proved: gradient, fp64: off by 0.25 instead of at most 1.0e-14 (worst at e.weight, "
                "update 7); no experiment explains it",
                "also: more memory than promised: saved activations: 1 instead of at most 0.375 (of 12 MiB)",
            ],
        ),
    ],
)
def test_the_first_line_is_the_verdict_and_its_first_reason(
    checks: list[Check], causes: list[Cause], lines: list[str]
) -> None:
    certificate = Certificate(checks, causes)
    assert certificate.lines == lines and str(certificate) == "\n".join(lines)
    assert certificate.proved == lines[0].startswith("proved")


def test_without_a_cause_the_first_failing_update_is_named() -> None:
    fine = Series("loss", "loss", [1], [0.0], [0.0])
    later = Series("loss", "loss", [9], [1.0], [0.0])
    (line,) = Certificate([check()], series=[fine, LATE, later]).lines
    assert LATE.failing == [3, 4] and fine.failing == []
    assert line.endswith("(worst at e.weight, update 7), first in update 3; no experiment explains it")


@pytest.mark.parametrize(
    ("failed", "text"),
    [
        (check(figure=math.nan), "gradient, fp64: not a number"),
        (check(figure=math.inf), "gradient, fp64: nothing that can be compared"),
        (
            replace(check(), bound=math.nan),
            "gradient, fp64: off by 0.25, where the larger batch itself is not",
        ),
        (replace(check(), bound=0.0), "gradient, fp64: off by 0.25 instead of 0"),
    ],
)
def test_a_check_without_a_finite_figure_or_bound_is_described(failed: Check, text: str) -> None:
    assert Certificate([failed]).lines[0].startswith(f"not proved: {text}")


def test_series_counts_and_notes_are_in_the_json() -> None:
    counts = Counts("update 3, e.weight", [[1.0, math.nan]])
    read = json.loads(Certificate([MEMORY], series=[LATE], counts=[counts], notes=["a note"]).as_json())
    assert read["checks"][0]["about"] == "memory" and read["notes"] == ["a note"]
    assert read["series"][0]["figures"] == [0.0, 1e-16, 0.2, "nan"] and read["series"][0]["updates"][3] == 4
    assert read["counts"] == [{"where": "update 3, e.weight", "counts": [[1.0, "nan"]]}]


# The terminal --------------------------------------------------------------------------------------------


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """A terminal with colours; what was printed on it."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", width=100)
    monkeypatch.setattr(terminal, "console", console)
    monkeypatch.setattr(show, "console", console)
    return file.getvalue


@pytest.fixture
def failed() -> Certificate:
    checks = [FINE, check("gradient, 9 updates"), replace(FINE, name="samples", decided=False), MEMORY]
    causes = [DROPOUT, cause("first", "[bold]e[/]"), cause("second", effect=math.nan)]
    return Certificate(checks, causes, notes=["samples 3 and 5 are [identical]"])


def plain(text: str) -> list[str]:
    return [line.rstrip() for line in re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text).splitlines()]


def test_the_verdict_and_its_cause_come_first_and_then_the_failed_checks(
    failed: Certificate, screen: Callable[[], str]
) -> None:
    show.show(failed)
    assert screen().startswith("\x1b[1;31mnot proved: [bold]e[/]: first")
    lines = plain(screen())
    assert lines[:13] == [
        "not proved: [bold]e[/]: first",
        "  effect  the update's gradient is off by 0.25 of its norm",
        "  shown   by this",
        "  to do   that",
        "also: second",
        "  shown   by this",
        "  to do   that",
        "also: more memory than promised: saved activations: 1 instead of at most 0.375 (of 12 MiB)",
        "3 (Dropout): draws depend on the split",
        "  effect  the update's gradient is off by 0.25 of its norm",
        "  shown   by this",
        "  to do   that",
        "note: samples 3 and 5 are [identical]",
    ]
    assert [line.split("  ")[0].strip() for line in lines[14:17]] == [
        "check",
        "gradient, 9 updates",
        "saved activations",
    ]
    assert "differs" in lines[15] and "exceeds" in lines[16]
    assert lines[17:] == ["1 other checks passed, 1 had nothing to compare (-v lists them)"]


def test_verbose_lists_all_checks_those_that_failed_first(
    failed: Certificate, screen: Callable[[], str]
) -> None:
    show.show(failed, verbose=True)
    names = [line.split("  ")[0].strip() for line in plain(screen())[15:]]
    assert names == ["gradient, 9 updates", "saved activations", "gradient, fp64", "samples"]
    assert "lists them" not in screen()


def test_a_proof_shows_a_few_figures_in_green(screen: Callable[[], str]) -> None:
    names = ["gradient, fp64", "gradient, weighted items", "gradient, fp32", "gradient, 9 updates", "resume"]
    checks = [*(check(name, 1e-16) for name in names), replace(MEMORY, figure=0.25)]
    show.show(Certificate(checks, subject={"precision": "fp32"}))
    assert screen().startswith("\x1b[1;32mproved")
    lines = plain(screen())
    shown = [line.split("  ")[0].strip() for line in lines[3:-1]]
    assert shown == ["gradient, fp64", "gradient, fp32", "gradient, 9 updates", "saved activations"]
    assert lines[-1] == "all 6 checks passed (-v lists them)"


def test_a_proof_up_to_a_source_is_yellow(screen: Callable[[], str]) -> None:
    show.show(Certificate([FINE], [DROPOUT]))
    assert screen().startswith("\x1b[1;33mproved up to a source (3 (Dropout))")
    assert "draws depend on the split" in plain(screen())[1]


def test_an_update_is_shown_behind_its_stage(screen: Callable[[], str]) -> None:
    with show.stages() as stage:
        stage("9 updates [one by one]")
        stage("update 4 of 9")
        show.console._live_stack[0].refresh()
        assert "proving: 9 updates [one by one]: update 4 of 9" in screen()
        stage("why")
        show.console._live_stack[0].refresh()
        assert "proving: why" in screen()


def test_stages_print_nothing_into_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(show, "console", Console(force_terminal=False))
    with show.stages() as stage:
        stage("update 4 of 9")
    assert capsys.readouterr().out == ""


# The page and its pictures -------------------------------------------------------------------------------


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html.partition("<body>")[2])
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def whole() -> Certificate:
    """A certificate with everything in it, and strange names in all of it."""
    checks = [FINE, check(STRANGE, detail=STRANGE), check("resume", decided=False)]
    subject = {"model": "Net", "steps": 4, "micro_batch_size": 2, "samples": 8, "ranks": 1}
    config = {"accum": {"steps": 4}, "model": {STRANGE: STRANGE}}
    counts = Counts(f"update 3, {STRANGE}", [[1.0, 0.25], [1.0, 2.0]])
    causes = [cause(STRANGE, STRANGE), cause("second")]
    return Certificate(
        checks, causes, subject, {"versions": {"torch": "2"}}, config, [LATE], [counts], [STRANGE]
    )


def test_the_page_says_everything_and_loads_nothing(whole: Certificate, tmp_path: Path) -> None:
    path = save_certificate(whole, tmp_path / "new" / "folder")
    assert path.name == "certificate.html" and json.loads((path.parent / "certificate.json").read_text())
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags} and "link" not in {tag for tag, _ in page.tags}
    sources = [attributes.get("src") or attributes.get("href") for _, attributes in page.tags]
    sources = [source for source in sources if source]
    assert len(sources) == 2 and all(str(source).startswith("data:image/png;base64,") for source in sources)
    head = html.partition("<body>")[0]
    assert '<meta name="viewport" content="width=device-width' in head and "http" not in head
    strange = " ".join(STRANGE.split())
    first = [
        "Is Net's window of 4 micro-batches of 2 the batch of 8?",
        f"not proved: {strange}: {strange}",
        "the update's gradient is off by 0.25 of its norm",
        "also: second",
        "1 other checks passed, 1 had nothing to compare",
        "Error by update, against its bound",
        "How often each micro-batch counts",
        "differs",
        "gradient, fp64",
        "accum.steps: 4",
    ]
    places = [page.text.find(text) for text in first]
    assert -1 not in places and places == sorted(places)
    assert page.text.count(strange) >= 7  # cause, note, check, detail, configuration
    assert "versions.torch" in page.text


def test_pictures_are_only_of_what_there_is(whole: Certificate, tmp_path: Path) -> None:
    save_certificate(whole, tmp_path)
    assert len(list(tmp_path.glob("certificate-*.png"))) == 2
    path = save_certificate(Certificate([FINE]), tmp_path)  # of another one in the same folder
    assert not list(tmp_path.glob("*.png"))
    assert "img" not in [tag for tag, _ in Page(path.read_text()).tags]


def test_errors_are_drawn_beside_their_bounds_and_failing_updates_marked() -> None:
    bits = Series("parameters", "relative", [1, 2], [0.0, 0.0], [0.0, 0.0])
    one = Series("gradient, fp32", "relative", [4], [math.inf], [1e-6])
    figure = errors_figure([LATE, bits, one])
    assert figure is not None
    axes = figure.axes[0]
    lines: dict[str, Any] = {str(line.get_label()): line for line in axes.lines}
    assert list(lines) == ["bound", "found", "no difference", "above the bound in 2 of 4"]
    assert list(lines["bound"].get_ydata()) == [1e-14] * 4 and lines["bound"].get_color() == BOUND
    assert list(lines["found"].get_xdata()) == [2] and list(lines["no difference"].get_xdata()) == [1]
    failing = lines["above the bound in 2 of 4"]
    low, high = axes.get_ylim()
    assert failing.get_color() == WRONG and list(failing.get_xdata()) == [3, 4]
    assert failing.get_ydata()[0] == 0.2 and 0.2 < failing.get_ydata()[1] < high  # nan, at the upper end
    assert axes.get_yscale() == "log" and low > 0
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["0"]
    many = errors_figure([LATE] * 40)
    assert errors_figure([]) is None and many is not None and len(many.axes) == MAX_PANELS


def test_counts_are_bars_by_rank_and_micro_batch_with_the_line_at_1() -> None:
    figure = counts_figure([Counts("update 3", [[1.0, 0.25], [math.nan, -2.0]])])
    assert figure is not None
    (axes,) = figure.axes
    bars: Any = axes.containers[0]
    lines: list[Any] = list(axes.lines)
    assert [bar.get_height() for bar in bars] == [1.0, 0.25, 0.0, -2.0]
    assert [to_hex(bar.get_facecolor()).upper() for bar in bars] == [RIGHT, WRONG, WRONG, WRONG]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "0", "1"]
    assert {"rank 0", "rank 1", "1", "0.25", "?", "-2"} <= {text.get_text() for text in axes.texts}
    assert [1, 1] in [list(line.get_ydata()) for line in lines] and axes.get_ylim()[0] < -2
    many = counts_figure([Counts("update 3", [[1.0] * 511 + [2.0]] * 8)])
    assert many is not None and not many.axes[0].containers and many.axes[0].collections


def test_the_note_begins_with_the_verdict_and_fits_into_a_tag(whole: Certificate) -> None:
    from mlflow.utils.validation import MAX_TAG_VAL_LENGTH

    note = show.markdown(whole, "certificate.html")
    assert note.startswith("**not proved: ") and "artifact `certificate.html`" in note
    assert note.index("| **differs** |") < note.index("| ok |") and "<script" not in note.replace("\\<", "")
    many = replace(whole, checks=[check(f"check {number}" + "x" * 50) for number in range(500)])
    note = show.markdown(many, "certificate.html")
    assert len(note) <= MAX_TAG_VAL_LENGTH and note.endswith("|\n\n... cut here")


def test_prove_keeps_page_and_pictures_in_mlflow(
    whole: Certificate, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = composed(
        *("device=cpu", "model=mlp", "model.hidden=[8]", "data.image_size=8", "accum.steps=4"),
        f"tracking.uri=sqlite:///{folder / 'mlflow.db'}",
    )
    experiment = Experiment.build(config)
    monkeypatch.setattr(session, "prove_experiment", lambda *_: (whole, experiment))
    assert not session.make_certificate(config, RunFolder(folder / "run"), RankInfo(), verbose=True)
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].startswith("not proved: ") and "(-v lists them)" not in printed
    client = Store(config.tracking).client
    (run,) = client.search_runs([Store(config.tracking).experiment_id])
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {
        *("certificate.json", "certificate.html", "certificate-errors.png", "certificate-counts.png"),
    } <= names
    assert run.data.tags["mlflow.note.content"].startswith("**not proved: ")
    assert run.data.tags["accumexp.certificate"].endswith("; also: second")


# The command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_prove_has_a_help_of_its_own(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prove", "accum.steps=4", flag])
    monkeypatch.setattr(command, "hydra_app", lambda task: pytest.fail("Hydra was started"))
    command.main()
    text = capsys.readouterr().out
    assert {"0 ", "1 ", "2 "} <= {line.strip()[:2] for line in text.splitlines()}
    assert "--verbose" in text and text.count("python -m accumexp.prove ") == 4
    for item in dataclasses.fields(ProofConfig):
        default = "null" if item.default is None else item.default
        assert f"  proof.{item.name}={default} " in text
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    ("arguments", "verbose"),
    [(["-v", "accum.steps=4"], True), (["accum.steps=4", "--verbose"], True), (["accum.steps=4"], False)],
)
def test_verbose_is_no_argument_of_hydra(
    arguments: list[str], verbose: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    def started(task: Callable[[Any], None]) -> None:
        assert sys.argv[1:] == ["accum.steps=4"]
        task(None)

    monkeypatch.setattr(sys, "argv", ["prove", *arguments])
    monkeypatch.setattr(command, "hydra_app", started)
    monkeypatch.setattr(job, "prove_job", lambda cfg, verbose: shown.append(verbose))
    command.main()
    assert shown == [verbose]


def test_verbose_reaches_the_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    def made(*arguments: Any) -> bool:
        given["verbose"] = arguments[-1]
        return True

    monkeypatch.setattr(session, "make_certificate", made)
    spec = job.ProofSpec(composed(), RunFolder(tmp_path), "", {}, verbose=True)
    assert job.prove(spec) and given["verbose"] is True
