"""Certificates: checks with figures and bounds, causes of failed checks, and a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Verdict = Literal["proved", "proved up to", "not proved"]
About = Literal["update", "memory", "communication", "micro-batches", "logging"]
# What is wrong if checks about something else than the update fail.
BROKEN_PROMISES: dict[About, str] = {
    "memory": "more memory than promised",
    "communication": "more communication than promised",
    "micro-batches": "another number of micro-batches than asked for",
    "logging": "another loss is logged than the larger batch's",
}


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
        about: what is another one than promised if the check fails. Only "update" concerns the result of
            training.
    """

    name: str
    figure: float
    bound: float
    unit: str
    why: str
    detail: str = ""
    decided: bool = True
    about: About = "update"

    @property
    def passed(self) -> bool:
        return not self.decided or within(self.figure, self.bound)

    @property
    def excess(self) -> float:
        return excess(self.figure, self.bound)

    @property
    def description(self) -> str:
        """What was compared, how much it is off or how large it is, and where, in one phrase."""
        figure, bound = number(self.figure), number(self.bound)
        at_most = f"instead of at most {bound}" if self.bound else "instead of 0"
        if math.isnan(self.figure):
            text = f"{self.name}: not a number"
        elif math.isinf(self.figure):
            text = f"{self.name}: nothing that can be compared"
        elif not math.isfinite(self.bound):
            text = f"{self.name}: off by {figure}, where the larger batch itself is not finite"
        elif self.about == "update":
            text = f"{self.name}: off by {figure} {at_most}"
        else:
            text = f"{self.name}: {figure} {at_most}"
        return f"{text} ({self.detail})" if self.detail else text


def within(figure: float, bound: float) -> bool:
    """Whether `figure` is at most `bound`.

    A bound that is not finite comes from a larger batch that diverges, and nothing is within it.
    """
    return math.isfinite(bound) and figure <= bound


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
        explains: what else than the update is another one than promised because of it.
    """

    source: str
    where: str
    reason: str
    effect: float
    shown: str
    advice: str
    excused: bool = False
    explains: Sequence[About] = ()

    @property
    def line(self) -> str:
        return f"{self.where}: {self.reason}" if self.where else self.reason


@dataclass(frozen=True)
class Series:
    """A figure and its bound, by update.

    Attributes:
        name: what is compared.
        unit: as a check's.
        updates: their numbers, from 1, in ascending order.
        figures, bounds: one for each of the updates.
    """

    name: str
    unit: str
    updates: list[int]
    figures: list[float]
    bounds: list[float]

    @property
    def failing(self) -> list[int]:
        """The updates whose figure is not within its bound."""
        rows = zip(self.updates, self.figures, self.bounds, strict=True)
        return [update for update, figure, bound in rows if not within(figure, bound)]


@dataclass(frozen=True)
class Counts:
    """How often each micro-batch counts in a gradient; 1 is right.

    Attributes:
        where: the update, and the parameter group or parameter if it is not the whole gradient.
        counts: by rank, then by micro-batch.
    """

    where: str
    counts: list[list[float]]


@dataclass(frozen=True)
class Certificate:
    """The result of a proof.

    Attributes:
        causes: the most important one first.
        subject: what was certified: samples, steps, precision, ranks.
        environment: versions, device, code.
        config: the experiment's resolved configuration, where there is one.
        series: errors and their bounds over the updates.
        counts: how often micro-batches count.
        notes: sentences that a reader of the verdict must know, such as what was changed for the proof.
    """

    checks: Sequence[Check]
    causes: Sequence[Cause] = ()
    subject: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    series: Sequence[Series] = ()
    counts: Sequence[Counts] = ()
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

    @property
    def lines(self) -> list[str]:
        """The verdict with its first reason, in one line, and a line for each further reason."""
        sources = "; ".join(
            f"{c.source} ({c.where})" if c.where else c.source for c in self.causes if c.excused
        )
        if self.proved:
            return [f"{self.verdict} {sources}".rstrip()]
        reasons = [cause.line for cause in self.causes if not cause.excused]
        wrong_update = next((check for check in self.failed if check.about == "update"), None)
        if wrong_update and not reasons:
            reasons = [self._unexplained(wrong_update)]
        promises = self._broken_promises()
        if not reasons:
            up_to = f" up to {sources}" if sources else ""
            promises[0] = f"the update is the larger batch's{up_to}, but {promises[0]}"
        first, *others = (" ".join(reason.split()) for reason in reasons + promises)
        return [f"not proved: {first}", *(f"also: {other}" for other in others)]

    def _unexplained(self, check: Check) -> str:
        """The failed `check`, and the first update of a series that fails."""
        first = min((series.failing[0] for series in self.series if series.failing), default=None)
        when = "" if first is None else f", first in update {first}"
        return f"{check.description}{when}; no experiment explains it"

    def _broken_promises(self) -> list[str]:
        """What is wrong besides the update and follows from no cause, the worst check of each kind."""
        promises = []
        explained = {about for cause in self.causes for about in cause.explains}
        for about, text in BROKEN_PROMISES.items():
            checks = [check for check in self.failed if check.about == about]
            if checks and about not in explained:
                check = worst_check(checks)
                counted = about == "micro-batches" and check.detail
                promises.append(f"{text}: {check.detail if counted else check.description}")
        return promises

    def __str__(self) -> str:
        """The verdict and its first reason in the first line; further reasons in lines of their own."""
        return "\n".join(self.lines)

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


def first_names(names: Sequence[str]) -> str:
    """The first three of `names`, in words."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
