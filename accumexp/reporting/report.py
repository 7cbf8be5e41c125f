"""A sweep, judged: groups, what they are compared with, and the verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..config import ReportConfig
from ..errors import UsageError
from .groups import Group, grouped, references
from .jobs import Curve, Job, Sweep
from .noise import NoiseScale, noise_scales
from .statistics import Difference, Judgement, Summary, Verdict, difference, judge, seeds_needed, summary
from .trajectory import LOSS, Trajectory, compared


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
    """All that the pictures, the page and the tables show."""

    sweep: Sweep
    config: ReportConfig
    measure: Measure
    rows: list[Row]
    curves: dict[int, dict[int, Curve]]  # of the loss, by id of the group and by seed
    noise: list[NoiseScale]

    @property
    def comparisons(self) -> list[Row]:
        return [row for row in self.rows if row.comparison]

    @property
    def verdict(self) -> Verdict | None:
        """Of the whole sweep: the worst one. None if nothing was compared."""
        found = {row.comparison.verdict for row in self.rows if row.comparison}
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
    groups = grouped(sweep.jobs)
    measure = Measure.of(_metric(config, sweep))
    compared_with = references(groups)
    members = [(group, job) for group in groups for job in group.jobs.values()]
    losses: dict[int, dict[int, Curve]] = {id(group): {} for group in groups}
    curves_of = {id(job): job.curve(LOSS) for job in progress([job for _, job in members])}
    for group, job in members:
        losses[id(group)][job.seed] = curves_of[id(job)]
    rows = _rows(groups, compared_with, measure, config, losses)
    return Report(sweep, config, measure, rows, losses, noise_scales(groups))


def _rows(
    groups: Sequence[Group],
    compared_with: Sequence[Group | None],
    measure: Measure,
    config: ReportConfig,
    losses: dict[int, dict[int, Curve]],
) -> list[Row]:
    values = [_values(group, measure) for group in groups]
    by_group = {id(group): found for group, found in zip(groups, values, strict=True)}
    tests = sum(reference is not None for reference in compared_with)
    differences = [
        None if reference is None else _difference(by_group[id(group)], by_group[id(reference)], config)
        for group, reference in zip(groups, compared_with, strict=True)
    ]
    judgements = iter(judge([found for found in differences if found], config.confidence))
    rows = []
    for group, reference, found in zip(groups, compared_with, differences, strict=True):
        comparison = None
        if reference is not None and found is not None:
            trajectory = compared(group, reference, losses)
            judged, needed = next(judgements), None
            if judged.verdict is Verdict.undecided and found.pairs > 1:
                alpha = (1 - config.confidence) / tests
                needed = seeds_needed(found.std, config.margin, alpha, config.power)
            comparison = Comparison(reference, found, judged, trajectory, needed)
        mine = list(by_group[id(group)].values())
        rows.append(Row(group, summary(mine, config.confidence), comparison) if mine else None)
    return [row for row in rows if row is not None]


def _difference(mine: dict[int, float], other: dict[int, float], config: ReportConfig) -> Difference:
    seeds = sorted(mine.keys() & other.keys())
    differences = [mine[seed] - other[seed] for seed in seeds]
    return difference(differences, config.margin, config.confidence)


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
