"""Formats numbers and verdicts as text, for the terminal, the page, the note and the CSV."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from .analysis import Comparison, Metric, Report
from .groups import Group
from .noise import critical_batch_size
from .statistics import Difference, MeanEstimate, Verdict

MAX_NAMES = 8  # groups named in a sentence
MAX_CERTIFICATE = 24  # characters in a table; the page has the whole line
# How a certificate begins that is refused for memory or communication alone.
SAME_UPDATE = "not proved: the update is the larger batch's"


def mean_and_std(value: MeanEstimate, metric: Metric) -> str:
    """For example 97.12 ± 0.40."""
    digits = 2 if metric.unit else 4
    text = f"{value.mean:z.{digits}f}"
    return text if math.isnan(value.std) else f"{text} ± {value.std:.{digits}f}"


def signed_interval(difference: Difference, metric: Metric) -> str:
    """The mean difference and its interval, for example +0.12 [-0.30, +0.54]; zero has no minus sign."""
    digits = 2 if metric.unit else 4
    if difference.count == 0:
        return "no common seed"
    text = f"{difference.mean:+z.{digits}f}"
    if math.isnan(difference.low):
        return f"{text} (one pair)"
    return f"{text} [{difference.low:+z.{digits}f}, {difference.high:+z.{digits}f}]"


def p_value(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def certificate_cell(group: Group) -> str:
    """The group's certificates in at most `MAX_CERTIFICATE` characters; empty if there are none.

    If all runs have the same line, this is that line, shortened. Otherwise it counts the runs that are proved
    without an exception.
    """
    lines = group.certificates
    if not lines:
        return ""
    if len(lines) == len(group.jobs) and len(set(lines)) == 1:
        return textwrap.shorten(lines[0], MAX_CERTIFICATE, placeholder=" ...").removesuffix(": ...")
    return f"proved {lines.count('proved')} of {len(group.jobs)}"


def reason(comparison: Comparison, report: Report) -> str:
    """The reason for a comparison's verdict."""
    difference, decision, metric = comparison.difference, comparison.decision, report.metric
    trajectory = comparison.trajectory
    if trajectory.same is False:
        return (
            f"another training: its loss leaves the reference's at update {trajectory.departs_at} by "
            f"{trajectory.departs_by:.1e}, where rounding explains {trajectory.bound:.1e}"
        )
    if decision.verdict is Verdict.equivalent:
        nonzero = decision.p_different < 1 - report.config.confidence
        return "the difference is inside the margin" + (", though it is a real one" if nonzero else "")
    if decision.verdict is Verdict.different:
        side = "higher" if difference.mean > 0 else "lower"
        return f"{side} by {metric.with_unit(round(abs(difference.mean), 4))}"
    if difference.count < 2:
        return f"{difference.count or 'no'} pair of seeds cannot decide; run more"
    if not math.isfinite(difference.mean):
        return "a run of it has no finite value"
    if comparison.margin is None:
        return f"report.margin=... is needed, the largest difference of {metric.key} that does not matter"
    if comparison.seeds_needed is None:
        return "the spread over seeds is too large for this margin"
    needed = max(comparison.seeds_needed, difference.count + 1)
    return f"{difference.count} seeds do not tell; about {needed} would, if there is no difference"


def conclusion(report: Report) -> str:
    """The verdicts on the sweep in sentences."""
    if not report.rows:
        return "No job of this sweep has finished yet: there is nothing to compare."
    if not report.comparisons and len(report.rows) > 1:
        sentences = ["There is nothing to compare yet: of these groups each is its own reference."]
    elif not report.comparisons:
        sentences = ["One group of runs: there is nothing to compare it with."]
    else:
        sentences = [text for verdict in Verdict for text in _verdict_sentences(report, verdict)]
    if report.missing:
        verb = "has" if len(report.missing) == 1 else "have"
        sentences.append(f"{group_names(report.missing)} {verb} no finished job.")
    if incomplete := [row.group for row in report.rows if row.group.unfinished]:
        sentences.append(
            f"Not all seeds of {group_names(incomplete)} finished; only those that did are compared."
        )
    return " ".join(sentences)


def _verdict_sentences(report: Report, verdict: Verdict) -> list[str]:
    """The sentences on the groups with this verdict."""
    comparisons = [comparison for comparison in report.comparisons if comparison.verdict is verdict]
    if not comparisons:
        return []
    single = len(comparisons) == 1
    members = [comparison.group for comparison in comparisons]
    groups = f"{group_names(members)} {'is' if single else 'are'}"
    references = {comparison.reference.label for comparison in comparisons}
    reference = "its reference" if single else "their reference"
    if len(references) == 1:
        reference = references.pop()
    margin = report.margin_text
    if verdict is Verdict.different:
        return [f"{groups} different from {reference}."]
    if verdict is Verdict.undecided:
        return [f"{groups} undecided against {reference} at a margin of {margin}."]
    sentences = [f"{groups} equivalent to {reference}: {report.metric.name} within {margin}."]
    not_proved = [
        group
        for group in members
        if any(
            line.startswith("not proved") and not line.startswith(SAME_UPDATE) for line in group.certificates
        )
    ]
    if not_proved:
        are, updates = ("is", "its update is") if len(not_proved) == 1 else ("are", "their updates are")
        sentences.append(
            f"{group_names(not_proved)} {are} equivalent in {report.metric.name} and not proved: both are "
            f"true, {updates} not the larger batch's."
        )
    return sentences


def noise_conclusion(report: Report) -> str | None:
    """The batch size up to which a larger one is worth it; None if no job measured the noise scale."""
    if not report.noise:
        return None
    limit = critical_batch_size(report.noise)
    early = min(scale.early for scale in report.noise)
    sizes = sorted({row.group.batch_size for row in report.rows})
    below = [str(size) for size in sizes if size <= limit]
    text = (
        f"The gradient noise scale is {_two_digits(early)} samples early and {_two_digits(limit)} late in "
        f"training: a larger batch is worth it up to about {_two_digits(limit)} samples. There a run needs "
        "twice the fewest samples and twice the fewest updates; beyond it most of the added samples are "
        "wasted."
    )
    if len(sizes) < 2:
        return text
    lie = "lies" if len(below) == 1 else "lie"
    text += (
        f" Of the batches tried, {_list(below)} {lie} below." if below else " All batches tried lie above."
    )
    return f"{text} {_batch_size_results(report)}".strip()


def _batch_size_results(report: Report) -> str:
    """Names the batch sizes with worse results, if all runs saw as many samples as the smallest batch's."""
    smallest = min(report.rows, key=lambda row: row.group.batch_size).group
    comparisons = [comparison for comparison in report.comparisons if comparison.reference is smallest]
    samples_seen = {samples for row in report.rows for samples in row.group.finals("samples")}
    if len(samples_seen) != 1 or len(comparisons) < len(report.rows) - 1:
        return ""
    maximized = smallest.first.params.get("mode", "max") == "max"
    higher_is_better = maximized and not report.metric.key.endswith("loss")
    worse = [
        str(comparison.group.batch_size)
        for comparison in sorted(comparisons, key=lambda comparison: comparison.group.batch_size)
        if comparison.decision.verdict is Verdict.different
        and (comparison.difference.mean < 0) == higher_is_better
    ]
    if not worse:
        return f"At equal samples seen, none was shown to be worse than {smallest.batch_size}."
    return f"At equal samples seen, {_list(worse)} did worse than {smallest.batch_size}."


def three_digits(value: float) -> str:
    """A positive cost, rounded to three significant digits: 3.89, 78.9, 281, 25,600."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    decimals = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, decimals):,.{min(max(decimals, 0), 4)}f}"


def _two_digits(value: float) -> str:
    """A number of samples, rounded to two significant digits."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 else f"{rounded:g}"


def group_names(groups: Sequence[Group]) -> str:
    """The groups' labels as a list; a single key is named once."""
    labels = [group.label for group in groups]
    if len(groups[0].values) == 1:
        labels[1:] = [value for group in groups[1:] for value in group.values.values()]
    return _list(labels)


def _list(names: Sequence[str]) -> str:
    if len(names) > MAX_NAMES:
        names = [*names[:MAX_NAMES], f"{len(names) - MAX_NAMES} more"]
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"
