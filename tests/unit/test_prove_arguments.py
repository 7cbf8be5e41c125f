"""The arguments that `python -m accumexp.prove` takes for itself: its help and --verbose."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accumexp.config.schema import ProofConfig
from accumexp.prove import __main__ as command
from accumexp.prove import job, session
from accumexp.tracking.run_folder import RunFolder

from ..support.experiments import composed


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
