"""The analysis of a sweep: its groups, their comparisons with their references, and the verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..config.report import ReportConfig
from ..errors import UsageError
from .groups import Group, group_jobs, reference_groups
from .jobs import Curve, Job, Sweep
from .noise import NoiseScale, noise_scales
from .statistics import Decision, Difference, Summary, Verdict, compare_pairs, decide, seeds_needed, summarize
from .trajectory import COMPARED_UPDATES, LOSS, Trajectory, compare_losses

MAX_POINTS = 2000


@dataclass(frozen=True)
class Metric:
    """The metric that groups are compared by.

    Attributes:
        key: of `final/*`, without the prefix.
        factor: from the logged value to the shown one.
        unit: of a difference of shown values; empty for the metric's own.
    """

    key: str
    factor: float
    unit: str

    @classmethod
    def from_key(cls, key: str) -> Metric:
        """Accuracies are logged as fractions, shown in percent and compared in points."""
        return cls(key, 100.0, "points") if key.endswith("accuracy") else cls(key, 1.0, "")

    @property
    def default_margin(self) -> float | None:
        """Half a point for an accuracy; None for other metrics."""
        return 0.5 if self.unit else None

    @property
    def name(self) -> str:
        split = "" if self.key.startswith("eval_") else "test "
        return split + self.key.replace("_", " ")

    @property
    def heading(self) -> str:
        """The name with the unit of a value."""
        return self.name + (" (%)" if self.unit else "")

    def with_unit(self, difference: float) -> str:
        unit = self.unit.removesuffix("s") if difference == 1 else self.unit
        return f"{difference:g} {unit}".strip()


@dataclass(frozen=True)
class Comparison:
    """A group compared with its reference.

    Attributes:
        seeds_needed: for an undecided comparison, the number of pairs that would show equivalence if there is
            no difference; None if it is not known or above `statistics.MAX_SEEDS`.
    """

    group: Group
    reference: Group
    difference: Difference
    decision: Decision
    trajectory: Trajectory
    seeds_needed: int | None

    @property
    def verdict(self) -> Verdict:
        """The verdict on the metric, or `different` if the losses show another training."""
        return Verdict.different if self.trajectory.same is False else self.decision.verdict


@dataclass(frozen=True)
class Row:
    """One group of the report; `comparison` is None for a reference."""

    group: Group
    value: Summary
    comparison: Comparison | None

    @property
    def verdict(self) -> str:
        return self.comparison.verdict.value if self.comparison else "reference"


@dataclass(frozen=True)
class Report:
    """The results that the pictures, the page and the tables show.

    Attributes:
        margin: of the equivalence tests; None if none is configured and the metric has no default.
        missing: groups without a finished job.
        curves: the loss by `id` of the group and by seed.
    """

    sweep: Sweep
    config: ReportConfig
    metric: Metric
    margin: float | None
    rows: list[Row]
    missing: list[Group]
    curves: dict[int, dict[int, Curve]]
    noise: list[NoiseScale]

    @property
    def keys(self) -> list[str]:
        """The keys that distinguish the groups."""
        return list(self.rows[0].group.values) if self.rows else []

    @property
    def comparisons(self) -> list[Comparison]:
        return [row.comparison for row in self.rows if row.comparison]

    @property
    def verdict(self) -> Verdict | None:
        """The worst verdict of the comparisons; a missing group is undecided. None without comparisons."""
        verdicts = {comparison.verdict for comparison in self.comparisons}
        if verdicts and self.missing:
            verdicts.add(Verdict.undecided)
        order = (Verdict.different, Verdict.undecided, Verdict.equivalent)
        return next((verdict for verdict in order if verdict in verdicts), None)


def make_report(
    sweep: Sweep,
    config: ReportConfig,
    progress: Callable[[Sequence[Job]], Iterable[Job]] = iter,
) -> Report:
    """Reads the loss curves of `sweep` and analyses it.

    Args:
        progress: wraps the jobs whose curves are read, to show the progress.

    Raises:
        UsageError: if no job measured `config.metric`; names the metrics that there are.
    """
    groups = group_jobs(sweep.jobs)
    metric = Metric.from_key(_metric_key(config, sweep))
    margin = config.margin if config.margin is not None else metric.default_margin
    pairs = [pair for pair in zip(groups, reference_groups(groups), strict=True) if pair[0].jobs]
    jobs = [job for group, _ in pairs for job in group.jobs.values()]
    by_job = {id(job): thin(job.curve(LOSS)) for job in progress(jobs)}
    curves = {id(group): {seed: by_job[id(job)] for seed, job in group.jobs.items()} for group, _ in pairs}
    comparisons = _compare(pairs, metric, margin, config, curves)
    rows = [
        Row(group, summarize(list(values.values()), config.confidence), comparisons.get(id(group)))
        for group, _ in pairs
        if (values := _values(group, metric))
    ]
    missing = [group for group in groups if id(group) not in {id(row.group) for row in rows}]
    noise = noise_scales([group for group, _ in pairs])
    return Report(sweep, config, metric, margin, rows, missing, curves, noise)


def thin(curve: Curve) -> Curve:
    """`curve` with all of its first `COMPARED_UPDATES` and at most `MAX_POINTS` of the later ones.

    The choice depends on the updates alone, so that curves of equal length keep the same points.
    """
    stride = 1
    while sum(update % stride == 0 for update, _ in curve) > MAX_POINTS:
        stride *= 10
    return [(update, value) for update, value in curve if update <= COMPARED_UPDATES or update % stride == 0]


def _compare(
    pairs: Sequence[tuple[Group, Group | None]],
    metric: Metric,
    margin: float | None,
    config: ReportConfig,
    curves: dict[int, dict[int, Curve]],
) -> dict[int, Comparison]:
    """The comparisons of the groups that have a reference, by `id` of the group."""
    compared = [(group, reference) for group, reference in pairs if reference is not None]
    differences = []
    for group, reference in compared:
        values, baseline = _values(group, metric), _values(reference, metric)
        steps = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
        differences.append(compare_pairs(steps, margin, config.confidence, _resolution(group, metric)))
    decisions = decide(differences, config.confidence)
    comparisons = {}
    for (group, reference), difference, decision in zip(compared, differences, decisions, strict=True):
        needed = None
        if decision.verdict is Verdict.undecided and margin is not None and math.isfinite(difference.std):
            alpha = (1 - config.confidence) / len(differences)
            std = max(difference.std, _resolution(group, metric))
            needed = seeds_needed(std, margin, alpha, config.power)
        trajectory = compare_losses(group, reference, curves)
        comparisons[id(group)] = Comparison(group, reference, difference, decision, trajectory, needed)
    return comparisons


def _resolution(group: Group, metric: Metric) -> float:
    """The smallest step of an accuracy, one sample of the test split; 0 if it is not known."""
    samples = group.finals("test_samples")
    return metric.factor / max(samples) if metric.unit and samples else 0.0


def _values(group: Group, metric: Metric) -> dict[int, float]:
    return {
        seed: metric.factor * job.final[metric.key]
        for seed, job in group.jobs.items()
        if metric.key in job.final
    }


def _metric_key(config: ReportConfig, sweep: Sweep) -> str:
    keys = sorted({key for job in sweep.finished for key in job.final})
    if config.metric is not None:
        if keys and config.metric not in keys:
            raise UsageError(f"report.metric={config.metric}: the jobs of this sweep have {', '.join(keys)}")
        return config.metric
    return "accuracy" if "accuracy" in keys or not keys else "loss"
