"""`accum.steps=auto`: the number of steps that a run takes, on all its ranks."""

from __future__ import annotations

import logging

import torch.distributed as dist

from ..config.loading import with_steps
from ..config.schema import Config
from ..config.sizes import AUTO
from ..environment.console import amount, print_line
from ..environment.ranks import RankInfo
from ..errors import UsageError
from .planner import Planner
from .points import Limit, Point
from .trial_run import trial_run

log = logging.getLogger(__name__)
TAG = "accumexp.plan"


def choose_steps(
    config: Config, rank_info: RankInfo, resuming: bool = False
) -> tuple[Config, dict[str, str]]:
    """`config` with a number in place of `accum.steps=auto`, and MLflow tags with the measurement.

    All ranks call it, and take the most steps that any of them needs. A `config` without `auto` is returned
    as it is, with no tags.

    Args:
        resuming: the run continues from a checkpoint, whose configuration holds a number already.

    Raises:
        UsageError: on all ranks alike, if nothing fits; or if windows are recorded as CUDA graphs.
    """
    if config.accum.steps != AUTO:
        if config.accum.memory_limit is not None and not resuming and rank_info.first:
            setting = f"accum.memory_limit={config.accum.memory_limit}"
            log.warning("%s: has no effect, accum.steps=%s keeps to it", setting, AUTO)
        return config, {}
    if config.trainer.graph:
        raise UsageError(
            f"accum.steps={AUTO}: a recorded window keeps memory that cannot be tried beforehand, give "
            "accum.steps or leave trainer.graph out"
        )
    point, limit = measure_steps(config, rank_info)
    ranks = f" on each of {rank_info.size} ranks" if rank_info.size > 1 else ""
    window = f"{point.steps} micro-batches of" if point.steps > 1 else "one micro-batch of"
    summary = (
        f"{window} {point.micro_batch} samples{ranks}: predicted "
        f"{amount(point.predicted)}, measured {amount(point.measured or 0)}, at most {limit}"
    )
    print_line(f"accum.steps={AUTO}: {summary}")
    return with_steps(config, point.steps), {TAG: summary}


def measure_steps(config: Config, rank_info: RankInfo) -> tuple[Point, Limit]:
    """The point of this rank at the most steps that any rank chooses, and its limit."""
    with trial_run(config, rank_info) as trial:
        planner, point, error = None, None, None
        try:
            planner = Planner(trial)
            point = planner.choose()
        except UsageError as refused:
            error = str(refused)
        chosen = _gather_steps(point.steps if point else 0, error, rank_info)
        assert planner is not None and point is not None
        steps = max(chosen)
        if min(chosen) == steps:
            return point, planner.limit
        try:
            point = point if point.steps == steps else planner.measure(steps)
            if not point.fits:
                size = amount(point.measured or point.predicted)
                needs = point.trouble or f"{size}, and the limit is {planner.limit}"
                error = (
                    f"accum.steps={AUTO}: {steps} steps, which another rank needs, do not fit on rank "
                    f"{rank_info.rank}: {needs}; give accum.steps"
                )
        except UsageError as refused:
            error = str(refused)
        _gather_steps(steps, error, rank_info)
        return point, planner.limit


def _gather_steps(steps: int, error: str | None, rank_info: RankInfo) -> list[int]:
    """The steps of all ranks; raises the error of the first rank that has one, on all of them."""
    gathered = [(steps, error)] * rank_info.size
    if rank_info.size > 1:
        dist.all_gather_object(gathered, (steps, error))
    for _, refusal in gathered:
        if refusal:
            raise UsageError(refusal)
    return [rank_steps for rank_steps, _ in gathered]
