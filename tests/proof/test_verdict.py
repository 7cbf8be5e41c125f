"""The verdict follows from a certificate's checks and causes, and the certificate is strict JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from accumexp.proof import Cause, Certificate, Check


def check(figure: float, bound: float = 1.0, decided: bool = True) -> Check:
    return Check("gradient", figure, bound, "relative", "because", decided=decided)


EXCUSED = Cause("dropout draws", "1 (Dropout)", "draws", 0.1, "", "", excused=True)
FAULT = Cause("wrong denominator", "", "4 times too large", math.nan, "", "")


@pytest.mark.parametrize(
    ("checks", "causes", "verdict"),
    [
        ([check(1.0)], [], "proved"),
        ([check(1.0 + 1e-9)], [], "not proved"),
        ([check(math.nan)], [], "not proved"),
        ([check(0.0, math.nan)], [], "not proved"),
        ([check(math.inf)], [], "not proved"),
        ([check(5.0, decided=False)], [], "proved"),
        ([check(0.0)], [EXCUSED], "proved up to"),
        ([check(0.0)], [EXCUSED, FAULT], "not proved"),
        ([check(2.0)], [EXCUSED], "not proved"),
    ],
)
def test_the_verdict_follows_from_checks_and_causes(checks: Any, causes: Any, verdict: str) -> None:
    certificate = Certificate(checks, causes)
    assert certificate.verdict == verdict
    assert certificate.proved == (verdict != "not proved")


def test_a_certificate_is_strict_json() -> None:
    certificate = Certificate([check(math.nan), check(math.inf)], [FAULT], {"steps": 4}, {}, {"lr": math.nan})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(certificate.as_json(), parse_constant=refuse)
    assert read["verdict"] == "not proved" and read["summary"] == "not proved: 4 times too large"
    assert [c["figure"] for c in read["checks"]] == ["nan", "inf"]
    assert [c["passed"] for c in read["checks"]] == [False, False]


def test_a_bound_that_is_no_number_lets_nothing_pass() -> None:
    for bound in (math.inf, math.nan):
        assert not Check("gradient", 0.1, bound, "relative", "why").passed
