"""The file of what is still to be sent to a store, and how it is told in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accumexp.tracking.outbox import Outbox, described, read_unsent


def test_an_outbox_of_which_all_is_sent_starts_anew_when_it_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accumexp.tracking.outbox.LARGEST_SENT", 200)
    path = tmp_path / "unsent.jsonl"
    identity = {"uri": "sqlite:///a", "experiment_id": "1", "run_id": "1"}
    outbox = Outbox(path, identity)
    for number in range(30):
        outbox.add({"tags": {"number": str(number)}})
    entries, ends = outbox.take(10)
    assert [entry["tags"]["number"] for entry in entries] == [str(number) for number in range(10)]
    outbox.sent(ends[-1])
    assert len(read_unsent(path)[1]) == 30
    outbox.sent(outbox.take()[1][-1])
    outbox.flush()
    assert path.read_text() == json.dumps(identity) + "\n"
    outbox.add({"tags": {"number": "30"}})
    assert outbox.take()[0] == [{"tags": {"number": "30"}}]
    outbox.close([])
    assert not path.exists()


def test_what_is_left_is_counted_in_words() -> None:
    points = {"points": [["a", 1.0, 0, 0], ["b", 1.0, 0, 0]]}
    assert described([points, {"status": "FINISHED", "time": 0}]) == "2 points and the end"
    assert described([points, points]) == "4 points"
