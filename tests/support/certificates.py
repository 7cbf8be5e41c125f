"""Parts of certificates: checks, causes and a series, for tests of how they are told."""

from __future__ import annotations

import math
from typing import Any

from accumexp.proof import Cause, Check, Series

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
DROPOUT = cause("draws depend on the split", "3 (Dropout)", excused=True)
LATE = Series("gradient", "relative", [1, 2, 3, 4], [0.0, 1e-16, 0.2, math.nan], [1e-14] * 4)
