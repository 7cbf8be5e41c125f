"""Is it the same training? Loss curves against the reference's, so that rounding can be told from a bug.

Windows of the same batch give the same loss up to rounding, as long as the weights agree up to rounding. That
lasts: the first losses of right windows agree to a few units in the last place, and then part smoothly, by a
small factor an update, as chaos does. A wrong denominator, a lost sample or another learning rate shows at
once, in the first updates or as a jump out of rounding where a later window is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .groups import CUTS, Group
from .jobs import Curve

# Updates in which rounding has had no time to grow: Adam, which steps by the sign of the smallest gradients,
# takes five to reach ten units in the last place (ResNet-18, fp32).
EARLY = 4
# A growth within one update, out of rounding, that no training has by itself in most of its seeds at once.
JUMP = 100.0
LOOKED_AT = 100
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
        bound: what rounding explains, as `rounding_bound` has it.
        judged: the last update up to which the losses agree within the bound, 0 if it cannot be told.
        leaves: the update at which the loss leaves the reference's by more than rounding, in most pairs.
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
        if self.declared or not (self.judged or self.leaves):
            return None
        return self.leaves is None

    @property
    def words(self) -> str:
        if self.declared:
            return "another computation by its configuration: " + "; ".join(self.declared)
        if self.leaves is not None:
            return f"leaves at update {self.leaves}, by {self.by:.1e}"
        if self.bound >= TOO_COARSE:
            return f"not judged: in this precision rounding explains up to {self.bound:.1e}"
        if not self.judged:
            return "not known: the losses of the first updates were not recorded"
        return f"rounding only, up to update {self.judged}"


def compared(group: Group, reference: Group, curves: Mapping[int, Mapping[int, Curve]]) -> Trajectory:
    """How `group` trains beside `reference`; `curves` holds the loss by `id` of a group and by seed."""
    seeds = sorted(group.jobs.keys() & reference.jobs.keys())
    reasons = declared(group, reference)
    bound = max(rounding_bound(one) for one in (group, reference))
    pairs = [_relative(curves[id(group)][seed], curves[id(reference)][seed]) for seed in seeds]
    if group.batch_size != reference.batch_size or not pairs:
        pairs = []
    common = sorted(set.intersection(*[set(pair) for pair in pairs])) if pairs else []
    table = np.array([[pair[update] for update in common] for pair in pairs]).reshape(len(pairs), len(common))
    known = consecutive(common[:LOOKED_AT]) if bound < TOO_COARSE else 0
    leaves, judged, by = None, 0, math.nan
    if known > 1 and not reasons:  # the first loss depends on no update
        ends = [departure(row[:known], bound, epsilon_of(reference)) for row in table]
        leaves = in_most([end for end, _ in ends])
        judged = sorted(within for _, within in ends)[(len(ends) - 1) // 2]
    if leaves is not None:
        by = float(np.median(table[:, leaves - 1]))
    return Trajectory(
        declared=reasons,
        updates=np.array(common),
        median=np.median(table, axis=0) if common else np.zeros(0),
        low=table.min(axis=0) if common else np.zeros(0),
        high=table.max(axis=0) if common else np.zeros(0),
        bound=bound,
        judged=judged,
        leaves=leaves,
        by=by,
    )


def rounding_bound(group: Group) -> float:
    """The relative difference of two losses that rounding explains: 8 * sqrt(n) * u for n samples a batch.

    Sums of n terms err by sqrt(n) * u times a small factor with a probability that is all but 1, u half the
    precision's epsilon (Higham and Mary 2019, doi:10.1137/18M1226312); no less than one rounding to TF32
    where a GPU may have used it.
    """
    tags = group.first.tags
    bound = 8 * math.sqrt(group.batch_size) * epsilon_of(group) / 2
    device = tags.get("accumexp.device", "")
    on_a_gpu = bool(device) and "cores" not in device
    return max(bound, TF32) if tags.get("accumexp.tf32", str(on_a_gpu).lower()) == "true" else bound


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
    varied = [key for key in group.values if key not in (*CUTS, "data.batch_size", *keys)]
    reasons += [key for key in varied if group.values[key] != reference.values.get(key)]
    ghost = [job.params.get("model.ghost_size") for job in (mine, other)]
    if mine.params.get("model.norm") == "ghost" and ghost[0] != ghost[1]:
        reasons.append("model.ghost_size")  # which follows from the micro-batch where it is not given
    for job in (mine, other):
        if "accumexp.unequal" in job.tags:
            reasons.append(job.tags["accumexp.unequal"].partition(";")[0])
            break
    return reasons


def in_most(ends: Sequence[int | None]) -> int | None:
    """The update at which most pairs leave, None if there is none.

    At the same update, or two later: what one update does wrong shows in all seeds at once, but in a single
    one rounding may flip, at any time, a unit that weighs. So a late departure needs two pairs, too.
    """
    left = sorted(end for end in ends if end is not None)
    early = [end for end in left if end <= EARLY]
    if 2 * len(early) > len(ends):
        return early[len(early) // 2]
    for first in left:
        together = [end for end in left if first <= end <= first + 2]
        if len(together) > 1 and 2 * len(together) > len(ends):
            return together[len(together) // 2]
    return None


def departure(
    differences: Sequence[float] | np.ndarray, bound: float, epsilon: float
) -> tuple[int | None, int]:
    """(The update that leaves the reference by more than rounding or None, the last one within the bound).

    Args:
        differences: relative, of one pair, of consecutive updates from the first on.
    """
    before = epsilon
    for update, value in enumerate(differences, 1):
        if value > bound:
            jumped = value > JUMP * before
            return (update if update <= EARLY or jumped else None), update - 1
        before = max(before, value)
    return None, len(differences)


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
