"""The analysis of a sweep: its groups, their comparisons with their references, and the verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.schema import ReportConfig
from ..errors import UsageError
from .groups import Group, group_jobs, reference_groups
from .jobs import Curve, Sweep
from .noise import NoiseScale, noise_scales
from .statistics import (
    Decision,
    Difference,
    MeanEstimate,
    Verdict,
    compare_pairs,
    decide,
    seeds_needed,
    summarize,
)
from .trajectory import COMPARED_UPDATES, LOSS, Trajectory, compare_losses

MAX_POINTS = 2000
# The default margin of an accuracy in points, and of any other metric as a share of the reference's mean.
POINTS, SHARE = 0.5, 0.01


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
    def name(self) -> str:
        split = "" if self.key.startswith("eval_") else "test "
        return split + self.key.replace("_", " ")

    @property
    def heading(self) -> str:
        return self.name + (" (%)" if self.unit else "")

    def with_unit(self, difference: float) -> str:
        unit = self.unit.removesuffix("s") if difference == 1 else self.unit
        return f"{difference:g} {unit}".strip()

    def values(self, group: Group) -> dict[int, float]:
        """The shown values of the group's jobs that measured the metric, by seed."""
        finals = {seed: job.final.get(self.key) for seed, job in group.jobs.items()}
        return {seed: self.factor * value for seed, value in finals.items() if value is not None}

    def resolution(self, group: Group) -> float:
        """The smallest step of an accuracy, one sample of the test split; 0 if it is not known."""
        samples = group.finals("test_samples")
        return self.factor / max(samples) if self.unit and samples else 0.0


@dataclass(frozen=True)
class Comparison:
    """A group compared with its reference.

    Attributes:
        margin: the largest difference that does not matter; None where a share of the reference's value is
            none, because that is 0 or not finite.
        seeds_needed: for an undecided comparison, the number of pairs that would show equivalence if there is
            no difference; None if unknown or above `statistics.MAX_SEEDS`.
    """

    group: Group
    reference: Group
    difference: Difference
    decision: Decision
    trajectory: Trajectory
    seeds_needed: int | None
    margin: float | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict on the metric, or `different` if the losses show another training."""
        return Verdict.different if self.trajectory.same is False else self.decision.verdict


@dataclass(frozen=True)
class Row:
    """One group of the report; `comparison` is None for a reference."""

    group: Group
    value: MeanEstimate
    comparison: Comparison | None

    @property
    def verdict(self) -> str:
        return self.comparison.verdict.value if self.comparison else "reference"


@dataclass(frozen=True)
class Report:
    """The results that the pictures, the page and the tables show.

    Attributes:
        margin: of the equivalence tests; None for a share of each reference's value, as `Comparison.margin`.
        missing: groups without a finished job.
        curves: the loss by group and seed.
    """

    sweep: Sweep
    config: ReportConfig
    metric: Metric
    margin: float | None
    rows: list[Row]
    missing: list[Group]
    curves: dict[Group, dict[int, Curve]]
    noise: list[NoiseScale]

    @property
    def keys(self) -> list[str]:
        """The keys that distinguish the groups."""
        return list(self.rows[0].group.values) if self.rows else []

    @property
    def certified(self) -> bool:
        """Whether any run in the groups has a certificate."""
        return any(row.group.certificates for row in self.rows)

    @property
    def margin_text(self) -> str:
        """The margin with its unit."""
        return f"{SHARE:.0%} of the reference" if self.margin is None else self.metric.with_unit(self.margin)

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
    sweep: Sweep, config: ReportConfig, progress: Callable[[Sequence[Any]], Iterable[Any]] = iter
) -> Report:
    """Analyses `sweep`; `progress` wraps the runs whose loss curves are read.

    Raises:
        UsageError: if no job measured `config.metric`; names the metrics that there are.
    """
    groups = group_jobs(sweep.jobs)
    metric = Metric.from_key(_metric_key(config, sweep))
    default_margin = POINTS if metric.unit else None
    margin = default_margin if config.margin is None else config.margin
    pairs = zip(groups, reference_groups(groups), strict=True)
    references = {group: reference for group, reference in pairs if group.jobs}
    curves: dict[Group, dict[int, Curve]] = {group: {} for group in references}
    runs = [(group, seed) for group in references for seed in group.jobs]
    for group, seed in progress(runs):
        curves[group][seed] = thin(group.jobs[seed].curve(LOSS))
    comparisons = _compare(references, metric, margin, config, curves)
    rows = [
        Row(group, summarize(list(values.values()), config.confidence), comparisons.get(group))
        for group in references
        if (values := metric.values(group))
    ]
    missing = [group for group in groups if group not in {row.group for row in rows}]
    return Report(sweep, config, metric, margin, rows, missing, curves, noise_scales(list(references)))


def thin(curve: Curve) -> Curve:
    """`curve` with all of its first `COMPARED_UPDATES` and at most `MAX_POINTS` of the later ones.

    The choice depends on the updates alone, so that curves of equal length keep the same points.
    """
    stride = 1
    while sum(update % stride == 0 for update, _ in curve) > MAX_POINTS:
        stride *= 10
    return [(update, value) for update, value in curve if update <= COMPARED_UPDATES or update % stride == 0]


def _compare(
    references: Mapping[Group, Group | None],
    metric: Metric,
    margin: float | None,
    config: ReportConfig,
    curves: Mapping[Group, Mapping[int, Curve]],
) -> dict[Group, Comparison]:
    """The comparisons of the groups that have a reference."""
    compared = [(group, reference) for group, reference in references.items() if reference is not None]
    differences, margins = [], []
    for group, reference in compared:
        values, baseline = metric.values(group), metric.values(reference)
        steps = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
        margins.append(_share(list(baseline.values())) if margin is None else margin)
        differences.append(compare_pairs(steps, margins[-1], config.confidence, metric.resolution(group)))
    decisions = decide(differences, config.confidence)
    comparisons = {}
    for (group, reference), difference, decision, margin in zip(
        compared, differences, decisions, margins, strict=True
    ):
        needed = None
        if decision.verdict is Verdict.undecided and margin is not None and math.isfinite(difference.std):
            alpha = (1 - config.confidence) / len(differences)
            std = max(difference.std, metric.resolution(group))
            needed = seeds_needed(std, margin, alpha, config.power)
        trajectory = compare_losses(group, reference, curves)
        comparisons[group] = Comparison(group, reference, difference, decision, trajectory, needed, margin)
    return comparisons


def _share(values: Sequence[float]) -> float | None:
    """The default margin against a reference with these values."""
    share = SHARE * abs(statistics.fmean(values)) if values else math.nan
    return share if math.isfinite(share) and share > 0 else None


def _metric_key(config: ReportConfig, sweep: Sweep) -> str:
    keys = sorted({key for job in sweep.finished for key in job.final})
    if config.metric is not None:
        if keys and config.metric not in keys:
            raise UsageError(f"report.metric={config.metric}: the jobs of this sweep have {', '.join(keys)}")
        return config.metric
    monitored = {job.params.get("monitor", "").partition("/")[2] for job in sweep.finished}
    if len(monitored) == 1 and monitored <= set(keys):
        return monitored.pop()
    return "accuracy" if "accuracy" in keys or not keys else "loss"
