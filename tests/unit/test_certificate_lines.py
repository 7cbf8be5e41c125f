"""What a certificate says in its lines, the first of which is the verdict, and in its JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from accumexp.proof import Cause, Certificate, Check, Counts, Series

from ..support.certificates import DROPOUT, FINE, LATE, MEMORY, cause, check

REDUCED = Check("gradient reductions a window", 4.0, 1.5, "count", "one", about="communication")
MADE = Check(
    "micro-batches a window", 3.0, 0.0, "count", "as asked", "steps=4 asked, 1 made", about="micro-batches"
)


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
