"""What a proof says: checks with figures and bounds, causes where equality fails, and a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["proved", "proved up to", "not proved"]


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what was compared.
        figure: what was found, in `unit`; inf where it could not even be compared.
        bound: what it may be at most.
        unit: "relative" (to the 2-norm of what it is compared with), "count", "ratio".
        why: one sentence, where the bound comes from.
        detail: what the figure is of: the worst parameter, the update, the window.
        decided: False where there was nothing to compare; such a check neither passes nor fails.
    """

    name: str
    figure: float
    bound: float
    unit: str
    why: str
    detail: str = ""
    decided: bool = True

    @property
    def passed(self) -> bool:
        if not self.decided:
            return True
        # What the larger batch itself has no number for bounds nothing; nan is above every bound.
        return math.isfinite(self.bound) and self.figure <= self.bound


@dataclass(frozen=True)
class Cause:
    """Why a window is not the larger batch, found by an experiment.

    Attributes:
        source: the kind of cause, such as "dropout draws" or "wrong denominator".
        where: the modules or the part of the loop, "" if it is all of it.
        reason: a phrase with figures.
        effect: the gradient's relative error that it makes, or nan where it is not of the gradient.
        shown: the experiment: what was changed, and what became of the error.
        advice: what to do.
        excused: whether the rest is proved once this source is held fixed: a window may differ from the
            larger batch by it as two runs of the larger batch differ from each other.
    """

    source: str
    where: str
    reason: str
    effect: float
    shown: str
    advice: str
    excused: bool = False

    @property
    def line(self) -> str:
        return f"{self.where}: {self.reason}" if self.where else self.reason


@dataclass(frozen=True)
class Certificate:
    """The proof's result.

    Attributes:
        subject: what was examined: samples, steps, precision, ranks.
        environment: versions, device, code.
        config: the experiment's resolved configuration, where there is one.
    """

    checks: Sequence[Check]
    causes: Sequence[Cause] = ()
    subject: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]

    @property
    def verdict(self) -> Verdict:
        if self.failed or not all(cause.excused for cause in self.causes):
            return "not proved"
        return "proved up to" if self.causes else "proved"

    @property
    def proved(self) -> bool:
        """Whether the window is the larger batch, up to sources that are named."""
        return self.verdict != "not proved"

    def __str__(self) -> str:
        """The verdict in a line."""
        if self.verdict == "proved":
            return "proved"
        if self.verdict == "proved up to":
            sources = "; ".join(f"{c.source} ({c.where})" if c.where else c.source for c in self.causes)
            return f"proved up to {sources}"
        causes = [cause.line for cause in self.causes if not cause.excused]
        reasons = causes or [f"{check.name}: {_fails(check)}" for check in self.failed]
        return f"not proved: {'; '.join(reasons)}"

    def as_dict(self) -> dict[str, Any]:
        """Everything, as dicts, lists, strings and finite numbers."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return _finite(
            {
                "verdict": self.verdict,
                "summary": str(self),
                "subject": dict(self.subject),
                "checks": checks,
                "causes": [asdict(cause) for cause in self.causes],
                "environment": dict(self.environment),
                "config": dict(self.config),
            }
        )

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"


def _fails(check: Check) -> str:
    return f"{number(check.figure)} instead of at most {number(check.bound)}"


def number(value: float) -> str:
    """A figure as a table shows it."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "inf"
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.3g}" if 0.001 <= abs(value) < 1000 else f"{value:.1e}"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
