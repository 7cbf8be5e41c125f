"""What a certificate says on the terminal, and the stages of a proof that goes on."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from accumexp.environment import console as terminal
from accumexp.proof import Certificate
from accumexp.prove import show

from ..support.certificates import DROPOUT, FINE, MEMORY, cause, check


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
