"""A sweep, judged: groups, what they are compared with, and the verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..config.report import ReportConfig
from ..errors import UsageError
from .groups import Group, grouped, references
from .jobs import Curve, Job, Sweep
from .noise import NoiseScale, noise_scales
from .statistics import Difference, Judgement, Summary, Verdict, difference, judge, seeds_needed, summary
from .trajectory import LOOKED_AT, LOSS, Trajectory, compared


@dataclass(frozen=True)
class Measure:
    """What groups are compared by: a key of `final/*`, its factor and its unit."""

    key: str
    factor: float
    unit: str

    @classmethod
    def of(cls, key: str) -> Measure:
        """Accuracies are fractions, shown in percent and compared in points; all else is taken as it is."""
        return cls(key, 100.0, "points") if key.endswith("accuracy") else cls(key, 1.0, "")

    @property
    def margin(self) -> float | None:
        """What does not matter unless somebody says otherwise; None if nobody knows."""
        return 0.5 if self.unit else None

    @property
    def name(self) -> str:
        """With the unit of a value, for a heading."""
        split = "" if self.key.startswith("eval_") else "test "
        return split + self.key.replace("_", " ") + (" (%)" if self.unit else "")

    def amount(self, value: float) -> str:
        """A difference or a margin, with its unit."""
        unit = self.unit.removesuffix("s") if value == 1 else self.unit
        return f"{value:g} {unit}".strip()


@dataclass(frozen=True)
class Comparison:
    """A group against its reference.

    Attributes:
        seeds_needed: pairs that would show equivalence if there is no difference, where it is undecided; None
            if that is not known, or more than anybody would run.
    """

    reference: Group
    difference: Difference
    judgement: Judgement
    trajectory: Trajectory
    seeds_needed: int | None

    @property
    def verdict(self) -> Verdict:
        """By accuracy, unless the training itself was another one than it claims to be."""
        return Verdict.different if self.trajectory.same is False else self.judgement.verdict


@dataclass(frozen=True)
class Row:
    """One group of the report; `comparison` is None for a reference."""

    group: Group
    value: Summary
    comparison: Comparison | None

    @property
    def reference(self) -> Group | None:
        return self.comparison.reference if self.comparison else None


@dataclass(frozen=True)
class Cost:
    """What a group paid an update: medians over its jobs; None where no job measured it.

    Attributes:
        update_ms: milliseconds an update.
        samples_per_second: samples trained.
        activation_mib: MiB saved for backward, of one micro-batch at a time.
        peak_mib: MiB at the peak, on the device; on a CPU of the whole process.
        seconds: of training a run.
    """

    update_ms: float | None
    samples_per_second: float | None
    activation_mib: float | None
    peak_mib: float | None
    seconds: float | None


@dataclass(frozen=True)
class Report:
    """All that the pictures, the page and the tables show.

    Attributes:
        margin: that the verdicts hold for, None if the metric has none by itself and none was given.
        missing: groups of which no job has finished.
    """

    sweep: Sweep
    config: ReportConfig
    measure: Measure
    margin: float | None
    rows: list[Row]
    missing: list[Group]
    curves: dict[int, dict[int, Curve]]  # of the loss, by id of the group and by seed
    noise: list[NoiseScale]

    @property
    def comparisons(self) -> list[Row]:
        return [row for row in self.rows if row.comparison]

    @property
    def verdict(self) -> Verdict | None:
        """Of the whole sweep: the worst one, a missing group undecided; None if nothing was compared."""
        found = {row.comparison.verdict for row in self.rows if row.comparison}
        if found and self.missing:
            found.add(Verdict.undecided)
        for verdict in (Verdict.different, Verdict.undecided, Verdict.equivalent):
            if verdict in found:
                return verdict
        return None


def costs(group: Group) -> Cost:
    """Medians over the group's jobs."""

    def median(key: str) -> float | None:
        values = group.finals(key)
        return statistics.median(values) if values else None

    return Cost(
        *map(median, ("update_ms", "samples_per_second", "activation_mib", "peak_memory_mib", "seconds"))
    )


def make_report(
    sweep: Sweep,
    config: ReportConfig,
    progress: Callable[[Sequence[Job]], Iterable[Job]] = iter,
) -> Report:
    """Reads what is still missing of `sweep`, computes and judges.

    Args:
        progress: wraps the jobs whose curves are read, to show how far that is.

    Raises:
        UsageError: if no job measured `config.metric`, naming what there is.
    """
    planned = grouped(sweep.jobs)
    measure = Measure.of(_metric(config, sweep))
    margin = config.margin if config.margin is not None else measure.margin
    pairs = [(group, other) for group, other in zip(planned, references(planned), strict=True) if group.jobs]
    jobs = [job for group, _ in pairs for job in group.jobs.values()]
    read = {id(job): thinned(job.curve(LOSS)) for job in progress(jobs)}
    curves = {id(group): {seed: read[id(job)] for seed, job in group.jobs.items()} for group, _ in pairs}
    rows = [row for row in _rows(pairs, measure, margin, config, curves) if row.value.count]
    missing = [group for group in planned if not any(row.group is group for row in rows)]
    return Report(sweep, config, measure, margin, rows, missing, curves, noise_scales([g for g, _ in pairs]))


def thinned(curve: Curve, most: int = 2000) -> Curve:
    """`curve` with all of its first points, by which it is judged, and at most `most` of the later ones.

    Which ones depends on their updates, so that curves of the same length keep the same.
    """
    stride = 1
    while sum(update % stride == 0 for update, _ in curve) > most:
        stride *= 10
    return [(update, value) for update, value in curve if update <= LOOKED_AT or update % stride == 0]


def _rows(
    pairs: Sequence[tuple[Group, Group | None]],
    measure: Measure,
    margin: float | None,
    config: ReportConfig,
    curves: dict[int, dict[int, Curve]],
) -> list[Row]:
    values = {id(group): _values(group, measure) for group, _ in pairs}
    compared_with = [(group, other) for group, other in pairs if other is not None]
    differences = []
    for group, other in compared_with:
        mine, others = values[id(group)], values[id(other)]
        steps = [mine[seed] - others[seed] for seed in sorted(mine.keys() & others.keys())]
        differences.append(difference(steps, margin, config.confidence, _resolution(group, measure)))
    comparisons = {}
    for (group, other), found, judged in zip(
        compared_with, differences, judge(differences, config.confidence), strict=True
    ):
        needed = None
        if judged.verdict is Verdict.undecided and margin is not None and math.isfinite(found.std):
            alpha = (1 - config.confidence) / len(differences)
            spread = max(found.std, _resolution(group, measure))
            needed = seeds_needed(spread, margin, alpha, config.power)
        path = compared(group, other, curves)
        comparisons[id(group)] = Comparison(other, found, judged, path, needed)
    return [
        Row(group, summary(list(values[id(group)].values()), config.confidence), comparisons.get(id(group)))
        for group, _ in pairs
    ]


def _resolution(group: Group, measure: Measure) -> float:
    """The smallest step of an accuracy, one sample of the test split; 0 where that is not known."""
    samples = group.finals("test_samples")
    return measure.factor / max(samples) if measure.unit and samples else 0.0


def _values(group: Group, measure: Measure) -> dict[int, float]:
    return {
        seed: measure.factor * job.final[measure.key]
        for seed, job in group.jobs.items()
        if measure.key in job.final
    }


def _metric(config: ReportConfig, sweep: Sweep) -> str:
    known = sorted({key for job in sweep.finished for key in job.final})
    if config.metric is not None:
        if known and config.metric not in known:
            raise UsageError(f"report.metric={config.metric}: the jobs of this sweep have {', '.join(known)}")
        return config.metric
    return "accuracy" if "accuracy" in known or not known else "loss"
