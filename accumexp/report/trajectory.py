"""Compares the training losses of a group and its reference, to distinguish rounding from a bug.

The first losses of two correct windows agree to a few units in the last place. Later they diverge smoothly,
by a small factor per update, because training is chaotic. A wrong denominator, a lost sample or another
learning rate shows in the first updates, or as a jump where a later window is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .groups import SPLIT_KEYS, Group
from .jobs import Curve

# Updates in which rounding errors have not grown yet: Adam, which steps by the sign of the smallest
# gradients, takes five to reach ten units in the last place (ResNet-18, fp32).
EARLY_UPDATES = 4
# Rounding errors do not grow by this factor within one update in most seeds at once.
JUMP_FACTOR = 100.0
COMPARED_UPDATES = 100
MAX_BOUND = 1e-2  # with a larger rounding bound the losses are not compared
TF32 = 2.0**-10
EPSILON = {"fp64": 2.0**-52, "fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}
LOSS = "train/loss"


@dataclass(frozen=True)
class Trajectory:
    """The relative difference of a group's loss to its reference's, over pairs of jobs with the same seed.

    The difference at an update is divided by the largest loss of the reference so far, because the rounding
    error of a loss does not fall with the loss.

    Attributes:
        declared: why the two differ by configuration; empty if they should be the same training.
        updates: updates at which all pairs have a point.
        median, low, high: of the relative difference over the seeds; shape (updates,).
        bound: the relative difference that rounding explains, see `rounding_bound`.
        agree_until: the last update at which the losses agree within the bound; 0 if they were not compared.
        departs_at: the update at which most pairs differ by more than rounding, or None.
        departs_by: the median relative difference there, or nan.
    """

    declared: list[str]
    updates: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bound: float
    agree_until: int
    departs_at: int | None
    departs_by: float

    @property
    def same(self) -> bool | None:
        """Whether this is the reference's training up to rounding; None if the losses were not compared."""
        if self.declared or not (self.agree_until or self.departs_at):
            return None
        return self.departs_at is None

    @property
    def description(self) -> str:
        if self.declared:
            return "another computation by its configuration: " + "; ".join(self.declared)
        if self.departs_at is not None:
            return f"leaves at update {self.departs_at}, by {self.departs_by:.1e}"
        if self.bound >= MAX_BOUND:
            return f"not judged: in this precision rounding explains up to {self.bound:.1e}"
        if not self.agree_until:
            return "not known: the losses of the first updates were not recorded"
        return f"rounding only, up to update {self.agree_until}"


def compare_losses(group: Group, reference: Group, curves: Mapping[Group, Mapping[int, Curve]]) -> Trajectory:
    """Compares the losses of `group` and `reference`, of which `curves` has all by group and seed."""
    seeds = sorted(group.jobs.keys() & reference.jobs.keys())
    declared = declared_differences(group, reference)
    bound = max(rounding_bound(group), rounding_bound(reference))
    pairs = [_relative_difference(curves[group][seed], curves[reference][seed]) for seed in seeds]
    pairs = pairs if group.batch_size == reference.batch_size else []
    updates = sorted(set.intersection(*map(set, pairs))) if pairs else []
    table = np.array([[pair[update] for update in updates] for pair in pairs])
    first_gap = next((index for index, update in enumerate(updates) if update != index + 1), len(updates))
    comparable = min(first_gap, COMPARED_UPDATES) if bound < MAX_BOUND else 0
    departs_at, agree_until, departs_by = None, 0, math.nan
    if comparable > 1 and not declared:  # the first loss does not depend on any update
        departures = [departure(row[:comparable], bound, precision_epsilon(reference)) for row in table]
        departs_at = common_departure([update for update, _ in departures])
        agree_until = sorted(last for _, last in departures)[(len(departures) - 1) // 2]
    if departs_at is not None:
        departs_by = float(np.median(table[:, departs_at - 1]))
    low, median, high = np.quantile(table, (0, 0.5, 1), axis=0) if updates else np.zeros((3, 0))
    return Trajectory(
        declared, np.array(updates), median, low, high, bound, agree_until, departs_at, departs_by
    )


def rounding_bound(group: Group) -> float:
    """The relative difference of two losses that rounding explains: 8 * sqrt(n) * u for a batch of n samples.

    A sum of n terms has an error of sqrt(n) * u times a small factor with high probability, u half the
    precision's epsilon (Higham and Mary 2019, doi:10.1137/18M1226312). At least one rounding to TF32 if a GPU
    may have used it.
    """
    tags = group.first.tags
    bound = 8 * math.sqrt(group.batch_size) * precision_epsilon(group) / 2
    device = tags.get("accumexp.device", "")
    on_gpu = bool(device) and "cores" not in device
    return max(bound, TF32) if tags.get("accumexp.tf32", str(on_gpu).lower()) == "true" else bound


def precision_epsilon(group: Group) -> float:
    """The distance from 1 to the next larger number in the group's precision."""
    return EPSILON.get(group.first.params.get("precision", "fp32"), EPSILON["fp32"])


def declared_differences(group: Group, reference: Group) -> list[str]:
    """The reasons in the configuration for which the two are not the same training up to rounding."""
    job, reference_job = group.first, reference.first
    reasons = []
    if group.batch_size != reference.batch_size:
        reasons.append("batch size")
    precision_keys = ("precision", "param_precision", "accum.loss_scale")
    if any(job.params.get(key) != reference_job.params.get(key) for key in precision_keys):
        reasons.append("precision")
    other_keys = [key for key in group.values if key not in (*SPLIT_KEYS, "data.batch_size", *precision_keys)]
    reasons += [key for key in other_keys if group.values[key] != reference.values.get(key)]
    ghost_size = "model.ghost_size"  # by default the micro-batch size, so it may differ unvaried
    if job.params.get("model.norm") == "ghost" and job.params.get(ghost_size) != reference_job.params.get(
        ghost_size
    ):
        reasons.append(ghost_size)
    unequal = job.tags.get("accumexp.unequal") or reference_job.tags.get("accumexp.unequal")
    return reasons + ([unequal.partition(";")[0]] if unequal else [])


def common_departure(departures: Sequence[int | None]) -> int | None:
    """The update at which most pairs depart, give or take two updates; None if there is none.

    A wrong window shows in all seeds at the same update. Rounding may flip a unit with a large weight in one
    seed at any update, so a departure after the first updates counts only in at least two pairs.
    """
    updates = sorted(update for update in departures if update is not None)
    early = [update for update in updates if update <= EARLY_UPDATES]
    if 2 * len(early) > len(departures):
        return early[len(early) // 2]
    for first in updates:
        together = [update for update in updates if first <= update <= first + 2]
        if len(together) > 1 and 2 * len(together) > len(departures):
            return together[len(together) // 2]
    return None


def departure(
    differences: Sequence[float] | np.ndarray, bound: float, epsilon: float
) -> tuple[int | None, int]:
    """The first of one pair's updates that differs by more than rounding, and the last within the bound."""
    largest = epsilon
    for update, value in enumerate(differences, 1):
        if value > bound:
            departs = update <= EARLY_UPDATES or value > JUMP_FACTOR * largest
            return (update if departs else None), update - 1
        largest = max(largest, value)
    return None, len(differences)


def _relative_difference(curve: Curve, reference: Curve) -> dict[int, float]:
    values, differences, largest = dict(curve), {}, 0.0
    for update, value in reference:
        if math.isfinite(value):
            largest = max(largest, abs(value))
            if math.isfinite(values.get(update, math.nan)):
                differences[update] = abs(values[update] - value) / (largest or 1.0)
    return differences
