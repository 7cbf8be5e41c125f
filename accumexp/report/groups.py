"""Jobs grouped by the keys that vary over the sweep, and the reference group of each group."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .jobs import Job

STEPS = "accum.steps"
# Keys that change how an update is split into micro-batches and ranks, but not the update itself.
SPLIT_KEYS = (STEPS, "accum.micro_batch_size", "accum", "accum.strategy", "accum.processes")

# The key of `final/*` for each cost of a run. `activation_mib` is saved for backward; `peak_mib` is of the
# tensors on the device; `seconds` is the training time.
COSTS = {
    "update_ms": "update_ms",
    "samples_per_second": "samples_per_second",
    "activation_mib": "activation_mib",
    "peak_mib": "peak_memory_mib",
    "seconds": "seconds",
}


@dataclass(frozen=True, eq=False)
class Group:
    """The jobs with one combination of the varied keys' values. Compares and hashes by identity.

    Attributes:
        values: the combination, key to value.
        jobs: the finished jobs by seed.
        unfinished: the number of the other jobs.
    """

    values: dict[str, str]
    jobs: dict[int, Job]
    unfinished: int = 0

    @property
    def first(self) -> Job:
        return next(iter(self.jobs.values()))

    @property
    def micro_batches(self) -> int:
        """Micro-batches in a window, over all ranks."""
        return self.first.number(STEPS) * self.first.number("accum.processes")

    @property
    def batch_size(self) -> int:
        return self.first.number("data.batch_size")

    @property
    def samples_per_update(self) -> float:
        """The average over the run; an epoch's last update may be smaller than `batch_size`."""
        final = self.first.final
        return final["samples"] / final["updates"] if final.get("updates") else float(self.batch_size)

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())

    @property
    def certificates(self) -> list[str]:
        """Of the finished runs, by seed: `proved`, `proved up to <sources>` or `not proved: <causes>`."""
        return [job.certificate for job in self.jobs.values() if job.certificate]

    def finals(self, key: str) -> list[float]:
        """`final/<key>` of the jobs that have it."""
        return [job.final[key] for job in self.jobs.values() if key in job.final]

    def costs(self) -> dict[str, float | None]:
        """The medians of `COSTS` over the jobs; None for what no job measured."""
        values = {name: self.finals(key) for name, key in COSTS.items()}
        return {name: statistics.median(costs) if costs else None for name, costs in values.items()}


def varied_keys(jobs: Sequence[Job]) -> list[str]:
    """The keys that vary over the jobs, except the seed; `accum.steps` if there are none."""
    keys = {key: None for job in jobs for key in job.overrides if key != "seed"}
    return [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1] or [STEPS]


def group_jobs(jobs: Sequence[Job]) -> list[Group]:
    """Groups the jobs by their values of the varied keys; groups are sorted by these values."""
    keys = varied_keys(jobs)
    finished: dict[tuple[str, ...], dict[int, Job]] = {}
    unfinished: Counter[tuple[str, ...]] = Counter()
    for job in jobs:
        values = tuple(job.overrides.get(key) or job.params.get(key, "default") for key in keys)
        members = finished.setdefault(values, {})
        if job.finished:
            members[job.seed] = job
        else:
            unfinished[values] += 1
    ranks = [_ranks(column) for column in zip(*finished, strict=True)]
    order = sorted(finished, key=lambda values: [rank[v] for v, rank in zip(values, ranks, strict=True)])
    return [
        Group(
            dict(zip(keys, values, strict=True)), dict(sorted(finished[values].items())), unfinished[values]
        )
        for values in order
    ]


def _ranks(column: Sequence[str]) -> dict[str, float]:
    """Sort keys of a column's values: by size if all are numbers, else by first occurrence."""
    try:
        return {value: float(value) for value in column}
    except ValueError:
        return {value: float(column.index(value)) for value in column}


def reference_groups(groups: Sequence[Group]) -> list[Group | None]:
    """The reference of each group; None for a reference itself and for groups without finished jobs.

    It is the group with the fewest micro-batches, of those that differ only in `SPLIT_KEYS` if there are any.
    """
    families: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        family = tuple(value for key, value in group.values.items() if key not in SPLIT_KEYS)
        families.setdefault(family, []).append(group)
    if groups and len(families) == len(groups):
        families = {(): list(groups)}
    references: dict[Group, Group | None] = {}
    for members in families.values():
        finished = [group for group in members if group.jobs]
        if finished:
            fewest = min(finished, key=lambda group: group.micro_batches)
            references.update({group: None if group is fewest else fewest for group in finished})
    return [references.get(group) for group in groups]


def varied_params(groups: Sequence[Group]) -> list[str]:
    """The params that distinguish the groups; for a config group, the params below it that vary."""
    configs = [group.first.params for group in groups]
    names: list[str] = []
    for key in groups[0].values if groups else ():
        below = sorted({name for params in configs for name in params if name.startswith(f"{key}.")})
        varied = [name for name in below if len({params.get(name) for params in configs}) > 1]
        names += [key] if any(key in params for params in configs) else varied
    return names or [STEPS]
