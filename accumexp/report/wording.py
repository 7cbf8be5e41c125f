"""Numbers and verdicts in words, alike in terminal, page, note and CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .analysis import Comparison, Measure, Report, Row
from .certificates import refuted
from .noise import worth
from .statistics import Difference, Summary, Verdict

MOST_NAMES = 8  # in a sentence


def spread(value: Summary, measure: Measure) -> str:
    """Mean and standard deviation: 97.12 ± 0.40."""
    digits = 2 if measure.unit else 4
    text = f"{value.mean:.{digits}f}"
    return text if math.isnan(value.std) else f"{text} ± {value.std:.{digits}f}"


def signed_interval(difference: Difference, measure: Measure) -> str:
    """The mean difference and its interval: +0.12 [-0.30, +0.54]."""
    digits = 2 if measure.unit else 4
    if difference.pairs == 0:
        return "no common seed"
    text = f"{difference.mean:+.{digits}f}"
    if math.isnan(difference.low):
        return f"{text} (one pair)"
    return f"{text} [{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"


def p_value(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def amount(value: float | None, unit: str, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}{unit}"


def outcome(comparison: Comparison, report: Report) -> str:
    """One sentence that says what the verdict on a group rests on."""
    found, judged, measure = comparison.difference, comparison.judgement, report.measure
    if comparison.trajectory.same is False:
        return (
            f"another training: its loss leaves the reference's at update {comparison.trajectory.leaves} by "
            f"{comparison.trajectory.by:.1e}, where rounding explains {comparison.trajectory.bound:.1e}"
        )
    if judged.verdict is Verdict.equivalent:
        real = judged.p_different < 1 - report.config.confidence
        zero = ", though it is a real one" if real else ""
        return f"the difference is inside the margin{zero}"
    if judged.verdict is Verdict.different:
        side = "higher" if found.mean > 0 else "lower"
        return f"{side} by {measure.amount(round(abs(found.mean), 4))}"
    if found.pairs < 2:
        return f"{found.pairs or 'no'} pair of seeds cannot decide; run more"
    if not math.isfinite(found.mean):
        return "a run of it has no finite value"
    if report.margin is None:
        return f"report.margin=... is needed, the largest difference of {measure.key} that does not matter"
    if comparison.seeds_needed is None:
        return "the spread over seeds is too large for this margin"
    needed = max(comparison.seeds_needed, found.pairs + 1)
    return f"{found.pairs} seeds do not tell; about {needed} would, if there is no difference"


def conclusion(report: Report) -> str:
    """The sweep's verdict in a sentence or a few, the first of which says it all."""
    rows = report.comparisons
    if not rows:
        if not report.rows:
            return "No job of this sweep has finished yet: there is nothing to compare."
        if len(report.rows) > 1:
            return "There is nothing to compare yet: of these groups each is its own reference." + _missing(
                report
            )
        return "One group of runs: there is nothing to compare it with." + _missing(report)
    margin = report.margin and report.measure.amount(report.margin)
    parts = []
    for verdict in Verdict:
        members = [row for row in rows if row.comparison and row.comparison.verdict is verdict]
        if not members:
            continue
        names = _enumerated([row.group.label for row in members])
        are = "is" if len(members) == 1 else "are"
        other = "its reference" if len(members) == 1 else "their reference"
        references = {row.comparison.reference.label for row in members if row.comparison}
        if len(references) == 1:
            other = references.pop()
        if verdict is Verdict.equivalent:
            parts.append(f"{names} {are} equivalent to {other}: {_what(report)} within {margin}.")
            parts += _not_proved(members, _what(report))
        elif verdict is Verdict.different:
            parts.append(f"{names} {are} different from {other}.")
        else:
            at = f" at a margin of {margin}" if margin else ""
            parts.append(f"{names} {are} undecided against {other}{at}.")
    return " ".join(parts) + _missing(report)


def _not_proved(rows: Sequence[Row], what: str) -> list[str]:
    """A sentence on those of the equivalent groups whose window is not the larger batch, if there are any."""
    names = [row.group.label for row in rows if refuted(row.group)]
    if not names:
        return []
    is_, its, update, is_not = (
        ("is", "its", "update", "is not") if len(names) == 1 else ("are", "their", "updates", "are not")
    )
    return [
        f"{_enumerated(names)} {is_} equivalent in {what} and not proved: both are true, {its} {update} "
        f"{is_not} the larger batch's."
    ]


def _missing(report: Report) -> str:
    """What the verdicts do not rest on, because it has not finished."""
    text = ""
    if report.missing:
        verb = "has" if len(report.missing) == 1 else "have"
        text = f" {_enumerated([group.label for group in report.missing])} {verb} no finished job."
    if any(row.group.unfinished for row in report.rows):
        text += " Of the other groups only the seeds that finished count."
    return text


def noise_conclusion(report: Report) -> str | None:
    """Up to which batch a larger one is worth it, or None if no job measured the noise scale."""
    if not report.noise:
        return None
    limit = worth(report.noise)
    early = min(scale.early for scale in report.noise)
    sizes = sorted({row.group.batch_size for row in report.rows})
    inside = [size for size in sizes if size <= limit]
    text = (
        f"The gradient noise scale is {_two(early)} samples early and {_two(limit)} late in training: a "
        f"larger batch is worth it up to about {_two(limit)} samples. There a run needs twice the fewest "
        "samples and twice the fewest updates; beyond it most of the added samples are wasted."
    )
    if len(sizes) > 1:
        verb = "lies" if len(inside) == 1 else "lie"
        names = _enumerated(list(map(str, inside)))
        text += f" Of the batches tried, {names} {verb} below." if inside else " All batches tried lie above."
        text += " " + _measured(report)
    return text.strip()


def _measured(report: Report) -> str:
    """What the runs say themselves, if all saw as many samples and are compared with the smallest batch."""
    smallest = min(report.rows, key=lambda row: row.group.batch_size).group
    others = [row for row in report.rows if row.group is not smallest]
    seen = {samples for row in report.rows for samples in row.group.finals("samples")}
    if len(seen) != 1 or any(row.reference is not smallest for row in others):
        return ""
    better = smallest.first.params.get("mode", "max")
    lower_is_worse = better == "max" and not report.measure.key.endswith("loss")
    worse = [
        str(row.group.batch_size)
        for row in sorted(others, key=lambda row: row.group.batch_size)
        if row.comparison
        and row.comparison.judgement.verdict is Verdict.different
        and (row.comparison.difference.mean < 0) == lower_is_worse
    ]
    if not worse:
        return f"At equal samples seen, none was shown to be worse than {smallest.batch_size}."
    return f"At equal samples seen, {_enumerated(worse)} did worse than {smallest.batch_size}."


def _two(value: float) -> str:
    """Two significant digits, as a count of samples."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:.0f}"
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.0f}" if digits <= 0 else f"{round(value, digits):g}"


def _what(report: Report) -> str:
    return report.measure.name.removesuffix(" (%)")


def _enumerated(names: Sequence[str]) -> str:
    common = {name.partition("=")[0] for name in names}
    if len(names) > 1 and len(common) == 1 and all(name.count("=") == 1 for name in names):
        names = [names[0], *[name.partition("=")[2] for name in names[1:]]]
    if len(names) > MOST_NAMES:
        names = [*names[:MOST_NAMES], f"{len(names) - MOST_NAMES} more"]
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def verdict_word(row: Row) -> str:
    return "reference" if row.comparison is None else row.comparison.verdict.value
