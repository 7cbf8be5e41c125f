"""Is it the same training? Loss curves against the reference's, so that rounding can be told from a bug.

Two windows of the same batch give the same loss up to rounding as long as the weights agree up to rounding.
The difference then grows smoothly: an update of stable training with momentum amplifies a disturbance at
most about fourfold (its sharpness times its rate stays below 2 + 2 * momentum, Cohen et al. 2021,
arXiv:2103.00065). A wrong denominator, a lost sample or another learning rate shows in one update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .groups import Group
from .jobs import Curve

# A growth within one update that no stable training has.
JUMP = 100.0
# Beyond this bound rounding explains too much to judge by.
TOO_COARSE = 1e-2
TF32 = 2.0**-10
EPSILON = {"fp64": 2.0**-52, "fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}
LOSS = "train/loss"


@dataclass(frozen=True)
class Trajectory:
    """A group's loss beside its reference's, pair by pair of the same seed.

    Attributes:
        declared: why the two cannot be the same training, by configuration; empty if they should be.
        updates: updates of which all pairs have a point.
        median, low, high: over the seeds, of |difference| / the largest loss of the reference so far, because
            the rounding of a loss does not fall with the loss; shape (updates,).
        bound: what rounding explains: batch size times the precision's epsilon, the worst case of a sum of
            that many terms (Higham 2002, Accuracy and Stability of Numerical Algorithms, 4.2), and no less
            than one rounding to TF32 where a GPU may have used it.
        judged: consecutive updates from the first on that were looked at, 0 if there are no such points.
        leaves: the update at which the loss leaves the reference's by more than rounding in most pairs.
        by: the relative difference there.
    """

    declared: list[str]
    updates: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bound: float
    judged: int
    leaves: int | None
    by: float

    @property
    def same(self) -> bool | None:
        """Whether this is the reference's training up to rounding; None if that cannot be told."""
        if self.declared or not self.judged:
            return None
        return self.leaves is None

    @property
    def words(self) -> str:
        if self.declared:
            return "not claimed: " + "; ".join(self.declared)
        if self.bound >= TOO_COARSE:
            return f"not judged: in this precision rounding explains up to {self.bound:.1e}"
        if not self.judged:
            return "not known: the losses of the first updates were not recorded"
        if self.leaves is None:
            return f"rounding only, up to update {self.judged}"
        return f"leaves at update {self.leaves}, by {self.by:.1e}"


def compared(group: Group, reference: Group, curves: Mapping[int, Mapping[int, Curve]]) -> Trajectory:
    """How `group` trains beside `reference`; `curves` holds the loss by `id` of a group and by seed."""
    seeds = sorted(group.jobs.keys() & reference.jobs.keys())
    reasons = declared(group, reference)
    epsilon = epsilon_of(reference)
    bound = reference.batch_size * epsilon
    if any(one.first.tags.get("accumexp.tf32") == "true" for one in (group, reference)):
        bound = max(bound, TF32)
    pairs = [_relative(curves[id(group)][seed], curves[id(reference)][seed]) for seed in seeds]
    if "batch size" in reasons or not pairs:
        pairs = []
    common = sorted(set.intersection(*[set(pair) for pair in pairs])) if pairs else []
    table = np.array([[pair[update] for update in common] for pair in pairs]).reshape(len(pairs), len(common))
    judged = consecutive(common) if bound < TOO_COARSE else 0
    judged = judged if judged > 1 else 0  # the first loss depends on no update
    ends = [departure(row[:judged], bound, epsilon) for row in table]
    left = sorted(index for index in ends if index is not None)
    leaves = left[len(left) // 2] if left and 2 * len(left) > len(ends) else None
    empty = np.zeros(0)
    return Trajectory(
        declared=reasons,
        updates=np.array(common),
        median=np.median(table, axis=0) if common else empty,
        low=table.min(axis=0) if common else empty,
        high=table.max(axis=0) if common else empty,
        bound=bound,
        judged=judged,
        leaves=None if leaves is None else common[leaves],
        by=math.nan if leaves is None else float(np.median(table[:, leaves])),
    )


def epsilon_of(group: Group) -> float:
    """The distance from 1 to the next number of the group's precision."""
    return EPSILON.get(group.first.params.get("precision", "fp32"), EPSILON["fp32"])


def declared(group: Group, reference: Group) -> list[str]:
    """Why the configuration itself says that the two are not the same training, up to rounding."""
    mine, other = group.first, reference.first
    reasons = []
    if group.batch_size != reference.batch_size:
        reasons.append("batch size")
    keys = ("precision", "param_precision", "accum.loss_scale")
    if any(mine.params.get(key) != other.params.get(key) for key in keys):
        reasons.append("precision")
    for job in (mine, other):
        if "accumexp.unequal" in job.tags:
            reasons.append(job.tags["accumexp.unequal"].partition(";")[0])
            break
    return reasons


def departure(differences: Sequence[float] | np.ndarray, bound: float, epsilon: float) -> int | None:
    """Index of the first difference above `bound` and `JUMP` times all before it; None if there is none.

    Args:
        differences: relative, of consecutive updates from the first on.
    """
    before = epsilon
    for index, value in enumerate(differences):
        if value > bound and value > JUMP * before:
            return index
        before = max(before, value)
    return None


def consecutive(updates: Sequence[int]) -> int:
    """How many updates from the first on are there without a gap."""
    count = 0
    while count < len(updates) and updates[count] == count + 1:
        count += 1
    return count


def _relative(curve: Curve, reference: Curve) -> dict[int, float]:
    mine, found, largest = dict(curve), {}, 0.0
    for update, value in reference:
        if math.isfinite(value):
            largest = max(largest, abs(value))
            if math.isfinite(mine.get(update, math.nan)):
                found[update] = abs(mine[update] - value) / (largest or 1.0)
    return found
