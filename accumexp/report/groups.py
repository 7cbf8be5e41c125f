"""Runs grouped by what varied, and which group each of them is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .jobs import Job

STEPS = "accum.steps"
# Keys that cut the same update into other micro-batches, here or on several ranks.
CUTS = (STEPS, "accum.micro_batch_size", "accum", "accum.strategy", "accum.processes")


@dataclass(frozen=True)
class Group:
    """One combination of what varied, with its finished jobs by seed and the number of those that are not."""

    values: dict[str, str]
    jobs: dict[int, Job]
    unfinished: int = 0

    @property
    def first(self) -> Job:
        return next(iter(self.jobs.values()))

    @property
    def steps(self) -> int:
        """Micro-batches in a window, on each rank."""
        return self.first.number(STEPS)

    @property
    def micro_batches(self) -> int:
        """Micro-batches in a window, on all ranks."""
        return self.steps * self.first.number("accum.processes")

    @property
    def batch_size(self) -> int:
        return self.first.number("data.batch_size")

    @property
    def samples_an_update(self) -> float:
        """On average: the last update of an epoch may have fewer than `batch_size`."""
        final = self.first.final
        return final["samples"] / final["updates"] if final.get("updates") else float(self.batch_size)

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())

    def finals(self, key: str) -> list[float]:
        """`final/<key>` of the group's jobs that have it."""
        return [job.final[key] for job in self.jobs.values() if key in job.final]


def varied_keys(jobs: Sequence[Job]) -> list[str]:
    """The keys that vary over the jobs, but the seed; `accum.steps` if none does."""
    every = {key: None for job in jobs for key in job.overrides}
    varied = [key for key in every if key != "seed" and len({job.overrides.get(key) for job in jobs}) > 1]
    return varied or [STEPS]


def grouped(jobs: Sequence[Job]) -> list[Group]:
    """`jobs`, grouped by what varies over all of them; numbers in their order."""
    keys = varied_keys(jobs)
    found: dict[tuple[str, ...], dict[int, Job]] = {}
    missing: Counter[tuple[str, ...]] = Counter()
    for job in jobs:
        values = tuple(job.overrides.get(key) or job.params.get(key, "default") for key in keys)
        members = found.setdefault(values, {})
        if job.finished:
            members[job.seed] = job
        else:
            missing[values] += 1
    columns = list(zip(*found, strict=True))
    order = sorted(
        found, key=lambda values: [_rank(v, column) for v, column in zip(values, columns, strict=True)]
    )
    return [
        Group(dict(zip(keys, values, strict=True)), dict(sorted(found[values].items())), missing[values])
        for values in order
    ]


def _rank(value: str, column: Sequence[str]) -> float:
    try:
        return {other: float(other) for other in column}[value]
    except ValueError:
        return column.index(value)


def references(groups: Sequence[Group]) -> list[Group | None]:
    """The group that each one is compared with: None for those that are the reference or have no job yet.

    Groups that differ only in how the window is cut are compared with the one of them that has the fewest
    micro-batches. Where no two groups are so alike, all are compared with the one of the fewest.
    """
    families: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        rest = tuple(value for key, value in group.values.items() if key not in CUTS)
        families.setdefault(rest, []).append(group)
    if groups and len(families) == len(groups):
        families = {(): list(groups)}
    found = {}
    for members in families.values():
        done = [group for group in members if group.jobs]
        if done:
            fewest = min(done, key=lambda group: group.micro_batches)
            found.update({id(group): None if group is fewest else fewest for group in done})
    return [found.get(id(group)) for group in groups]


def varied_params(groups: Sequence[Group]) -> list[str]:
    """The params that tell the groups apart: a varied key, or what the choice of a config group changes."""
    keys = list(groups[0].values) if groups else [STEPS]
    found: list[str] = []
    for key in keys:
        params = [group.first.params for group in groups]
        if any(key in one for one in params):
            found.append(key)
            continue
        below = sorted({name for one in params for name in one if name.startswith(f"{key}.")})
        found += [name for name in below if len({one.get(name) for one in params}) > 1]
    return found or [STEPS]
