"""What a certificate says first on its page, in its pictures and in MLflow's note."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex

from accumexp.environment.ranks import RankInfo
from accumexp.proof import Certificate, Counts, Series
from accumexp.prove import save_certificate, session, show
from accumexp.prove.pictures import BOUND, MAX_PANELS, RIGHT, WRONG, counts_figure, errors_figure
from accumexp.tracking import Store
from accumexp.tracking.run_folder import RunFolder
from accumexp.training.experiment import Experiment

from ..support.certificates import FINE, LATE, STRANGE, cause, check
from ..support.experiments import composed


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
