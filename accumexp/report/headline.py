"""The headline of a report: what the sweep has established, and what it has not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..sweeps.hydra_sweep import command_line
from .analysis import Comparison, Report
from .statistics import Verdict
from .wording import group_names, reason


@dataclass(frozen=True)
class Headline:
    """Sentences, the most important first.

    Attributes:
        established: what the runs show.
        open: what they do not show, with what would.
        command: certifies a window of this sweep; empty if all runs have a certificate or none could.
    """

    established: list[str]
    open: list[str]
    command: str


def headline(report: Report) -> Headline:
    """The sentences on training, metric and certificates."""
    established, unknown = [], []
    for shown, not_known in (_training(report), _metric(report), _certificates(report)):
        established += shown
        unknown += not_known
    return Headline(established, unknown, prove_command(report))


def _training(report: Report) -> tuple[list[str], list[str]]:
    """Whether the losses are those of the reference's training."""
    established, unknown = [], []
    if same := _chosen(report, lambda comparison: comparison.trajectory.same is True):
        until = min(comparison.trajectory.agree_until for comparison in same)
        established.append(
            f"Same training: the losses of {_names(same)} agree with {_reference(same)} to rounding up to "
            f"update {until}."
        )
    for comparison in _chosen(report, lambda comparison: comparison.trajectory.same is False):
        established.append(f"{comparison.group.label} is {reason(comparison, report)}.")
    unclear = _chosen(report, lambda comparison: comparison.trajectory.same is None)
    for text in dict.fromkeys(comparison.trajectory.description for comparison in unclear):
        members = [comparison for comparison in unclear if comparison.trajectory.description == text]
        unknown.append(f"Same training: of {_names(members)} {text}.")
    return established, unknown


def _metric(report: Report) -> tuple[list[str], list[str]]:
    """Whether the metric is equivalent, by the statistics alone."""
    name, margin = report.metric.name, report.margin_text
    established, unknown = [], []
    if inside := _chosen(report, lambda comparison: comparison.decision.verdict is Verdict.equivalent):
        established.append(
            f"{_sentence(name)}: {_names(inside)} within {margin} of {_reference(inside)}, at "
            f"{report.config.confidence:.0%} confidence."
        )
    for comparison in _chosen(report, lambda comparison: comparison.decision.verdict is Verdict.different):
        if comparison.trajectory.same is not False:
            established.append(
                f"{_sentence(name)}: {comparison.group.label} is {reason(comparison, report)} than "
                f"{comparison.reference.label}."
            )
    undecided = _chosen(report, lambda comparison: comparison.decision.verdict is Verdict.undecided)
    counted = [comparison for comparison in undecided if comparison.seeds_needed is not None]
    if counted:
        seeds = min(comparison.difference.count for comparison in counted)
        needed = max(
            max(comparison.seeds_needed or 0, comparison.difference.count + 1) for comparison in counted
        )
        are = "is" if len(counted) == 1 else "are"
        unknown.append(
            f"{_sentence(name)}: {seeds} seeds cannot show that {_names(counted)} {are} within {margin} of "
            f"{_reference(counted)}; about {needed} would, if there is no difference."
        )
    for comparison in undecided:
        if comparison not in counted and comparison.trajectory.same is not False:
            unknown.append(f"{_sentence(name)}: {comparison.group.label}: {reason(comparison, report)}.")
    return established, unknown


def _certificates(report: Report) -> tuple[list[str], list[str]]:
    """Whether the windows are certified."""
    runs = sum(len(row.group.jobs) for row in report.rows)
    lines = [line for row in report.rows for line in row.group.certificates]
    if not report.rows:
        return [], []
    if not lines:
        return [], ["Same update: not proved for any run."] if prove_command(report) else []
    established = []
    if proved := sum(line.startswith("proved") for line in lines):
        established.append(f"Same update: the windows of {proved} of {runs} runs are certified.")
    refused = len(lines) - proved
    if refused:
        has = "has" if refused == 1 else "have"
        established.append(f"Not proved: {refused} of {runs} runs {has} a certificate that says so.")
    missing = runs - len(lines)
    return established, [f"Same update: {missing} of {runs} runs have no certificate."] if missing else []


def prove_command(report: Report) -> str:
    """The command that certifies the window with the most micro-batches of those without a certificate."""
    groups = [row.group for row in report.rows if len(row.group.certificates) < len(row.group.jobs)]
    group = max(groups, key=lambda group: group.micro_batches, default=None)
    if group is None or group.micro_batches < 2:
        return ""
    job = group.first
    overrides = job.typed or [f"{key}={value}" for key, value in job.overrides.items()]
    unneeded = ("trainer.", "tracking.", "report.")
    words = [one for one in overrides if not one.lstrip("+~").startswith(unneeded)]
    return command_line([*report.sweep.files, *words], "prove")


def _chosen(report: Report, condition: Callable[[Comparison], bool]) -> list[Comparison]:
    return [comparison for comparison in report.comparisons if condition(comparison)]


def _names(comparisons: list[Comparison]) -> str:
    return group_names([comparison.group for comparison in comparisons])


def _reference(comparisons: list[Comparison]) -> str:
    """The reference of all, or that each has its own."""
    labels = {comparison.reference.label for comparison in comparisons}
    if len(labels) == 1:
        return labels.pop()
    return "their references"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
