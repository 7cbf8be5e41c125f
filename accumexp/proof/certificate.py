"""Certificates: checks with figures and bounds, causes of failed checks, and a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["proved", "proved up to", "not proved"]


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what is compared.
        figure: the difference, in `unit`; inf if the comparison was impossible.
        bound: the largest figure that passes.
        unit: "relative" (to the 2-norm of the expected value), "count", "ratio", "loss", "log ratio".
        why: one sentence that derives the bound.
        detail: where the figure occurred: the worst parameter, the update, the window.
        decided: False if there was nothing to compare; such a check neither passes nor fails.
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
        # A bound that is not finite comes from a larger batch that diverges; nan is above every bound.
        return math.isfinite(self.bound) and self.figure <= self.bound

    @property
    def excess(self) -> float:
        return excess(self.figure, self.bound)


def worst_check(checks: Iterable[Check]) -> Check:
    return max(checks, key=lambda check: check.excess)


def excess(figure: float, bound: float) -> float:
    """`figure` over `bound`, to order figures by; inf for nan, and for anything over a bound of 0."""
    if figure == 0 and not math.isnan(bound):
        return 0.0
    ratio = figure / bound if bound else math.inf
    return math.inf if math.isnan(ratio) else ratio


@dataclass(frozen=True)
class Cause:
    """Why a window is not the larger batch, found by an experiment.

    Attributes:
        source: the kind of cause, such as "dropout draws" or "wrong denominator".
        where: the modules or the part of the loop; "" for all of it.
        reason: a phrase with figures.
        effect: the relative error of the gradient that it makes; nan if it does not concern the gradient.
        shown: the experiment: what was changed, and the error afterwards.
        advice: what to do.
        excused: whether everything else is proved once this source is held fixed: a window may differ from
            the larger batch by it as two runs of the larger batch differ from each other.
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
    """The result of a proof.

    Attributes:
        subject: what was certified: samples, steps, precision, ranks.
        environment: versions, device, code.
        config: the experiment's resolved configuration, where there is one.
        notes: what was changed for the proof, or could not be seen.
    """

    checks: Sequence[Check]
    causes: Sequence[Cause] = ()
    subject: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

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
        """Whether the window is the larger batch, up to the sources that the verdict names."""
        return self.verdict != "not proved"

    def __str__(self) -> str:
        """The verdict in one line."""
        if self.proved:
            sources = "; ".join(f"{c.source} ({c.where})" if c.where else c.source for c in self.causes)
            return f"{self.verdict} {sources}".rstrip()
        reasons = [cause.line for cause in self.causes if not cause.excused] or [
            f"{check.name}: {number(check.figure)} instead of at most {number(check.bound)}"
            for check in self.failed
        ]
        return f"not proved: {'; '.join(reasons)}"

    def as_dict(self) -> dict[str, Any]:
        """All fields as dicts, lists, strings and finite numbers; other floats become strings."""
        checks = [{**asdict(check), "passed": check.passed} for check in self.checks]
        return _finite({"verdict": self.verdict, "summary": str(self), **asdict(self), "checks": checks})

    def as_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"


def number(value: float) -> str:
    """`value` formatted for a table."""
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
