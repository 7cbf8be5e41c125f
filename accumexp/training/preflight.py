"""Faults of a configuration that would end a run in the middle, found before its first update."""

from __future__ import annotations

import copy
import logging
from contextlib import closing
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..accum import call
from ..accum.batch import map_tensors, rank_share, steps_for
from ..data import Batches, StreamedBatches
from ..environment.cores import cores
from ..environment.random_state import random_state, restore_random_state
from ..errors import UsageError

if TYPE_CHECKING:
    from .experiment import Experiment

log = logging.getLogger(__name__)


def check_experiment(experiment: Experiment) -> None:
    """Refuses or warns of what would come up only in the middle of a run.

    Raises:
        UsageError: naming the key, for a micro-batch of one sample that the model's BatchNorm refuses.
    """
    train, ranks = experiment.splits.train, experiment.rank_info
    steps = cast(int, experiment.config.accum.steps)
    check_batch_statistics(experiment.model, train, steps, ranks.size, experiment.autocast)
    warning = workers_warning(experiment.config.data.workers, ranks.local_size)
    if warning and ranks.first and isinstance(train, StreamedBatches):
        log.warning(warning)


def smallest_micro_batch(train: Batches, steps: int, ranks: int) -> int:
    """Samples in the smallest micro-batch of full and last windows that has any, over all ranks."""
    full = train.batch_size
    last = train.samples % full if not train.drop_last else 0
    windows = [full] if train.samples >= full else []
    windows += [last] if last else []
    parts = (
        len(part)
        for total in windows
        for rank in range(ranks)
        for part in rank_share(total, steps_for(total, full, steps), rank, ranks)
    )
    return min((size for size in parts if size), default=full)


def check_batch_statistics(
    model: nn.Module, train: Batches, steps: int, ranks: int, autocast: torch.dtype | None
) -> None:
    """Tries the model on one sample if it has batch statistics and a micro-batch has one sample.

    The model and the random state are left as they were.

    Raises:
        UsageError: if its BatchNorm refuses a single value per channel.
    """
    with_statistics = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if (
        not any(module.training for module in with_statistics)
        or smallest_micro_batch(train, steps, ranks) > 1
    ):
        return
    state = random_state()
    try:
        with closing(cast(Any, train.epoch(0))) as batches:
            inputs = map_tensors(lambda tensor: tensor[:1], next(batches).inputs)
        trial = copy.deepcopy(model)
        device = next(trial.parameters()).device.type
        with torch.no_grad(), torch.autocast(device, autocast, enabled=autocast is not None):
            call(trial, inputs)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UsageError(
            f"data.batch_size={train.batch_size}: with accum.steps={steps} and {train.samples} samples a "
            "micro-batch has one sample, of which BatchNorm takes no statistics; set data.drop_last=true if "
            "it is in the last window, or another data.batch_size or accum.steps"
        ) from error
    finally:
        restore_random_state(state)


def workers_warning(workers: int, ranks_here: int = 1) -> str | None:
    """The warning of more data workers than this machine has cores, or None."""
    available = cores()
    if workers * ranks_here <= available:
        return None
    each = f" on each of {ranks_here} ranks" if ranks_here > 1 else ""
    best = max(1, available // ranks_here)
    return f"data.workers={workers}{each}: this machine has {available} cores, take data.workers={best}"
