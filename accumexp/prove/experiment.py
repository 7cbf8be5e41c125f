"""An experiment's certificate: the proof of its own loop, on its own data, and of its first updates."""

from __future__ import annotations

import copy
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from ..config.schema import Config, LossScaling, Reduction, Strategy, to_plain
from ..environment.device import code_version
from ..environment.ranks import RankInfo
from ..errors import UsageError
from ..proof import Cause, Certificate, Scaling
from ..proof.certify import REPLAYED, Proof, preserved_random_state
from ..proof.environment import precision_name
from ..proof.float64 import DOUBLE
from ..proof.gradients import MAX_SKIPPED, compare_window
from ..proof.larger_batch import norm
from ..proof.problem import Problem, copy_in
from ..proof.rounding import larger_batch_of
from ..training.experiment import Parts, build_optimizer, build_parts, build_scheduler, for_ranks, updates_of
from .first_updates import FirstUpdates, as_it_is, small, whole_batch
from .trainer_loop import TrainerLoop

# Batches that single windows are tried on.
BATCHES = 5
VERSIONS = ("accumexp", "torch", "torchvision", "numpy")


def prove_experiment(
    config: Config, rank_info: RankInfo, stage: Callable[[str], None]
) -> tuple[Certificate, Parts]:
    """The certificate of the experiment that `config` describes, and the parts that it was made with.

    On several ranks all of them call. Neither the parts nor torch's random state are as they were.

    Raises:
        UsageError: naming the key that cannot be built, or if the larger batch does not fit the device.
    """
    parts = build_parts(config, rank_info)
    problem = problem_of(config, parts, rank_info)
    proof = Proof(problem, stage, problem.steps if config.accum.reduce_every_micro_batch else 1)
    try:
        with preserved_random_state(problem):
            proof.fix_draws()
            proof.check_windows(replay=False)
            _clipping(proof, config, parts, rank_info)
            _follow(proof, config, parts, rank_info)
            proof.find_causes()
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"data.batch_size={config.data.batch_size}: the proof computes the larger batch in one piece, in "
            f"fp64, and {parts.device} has no room for it; prove with device=cpu, or with a smaller batch "
            "in as many accum.steps"
        ) from error
    except ValueError as error:
        raise UsageError(f"prove: {error}") from error
    found = proof.result()
    found = replace(found, causes=[_in_our_words(cause, config) for cause in found.causes])
    environment = {**found.environment, **_code()}
    return replace(found, environment=environment, config=to_plain(config)), parts


def problem_of(config: Config, parts: Parts, rank_info: RankInfo) -> Problem:
    """What the experiment's loop should do, on the first batches of its first epoch."""
    accum, train = config.accum, parts.splits.train
    found = [
        whole_batch(batch)[0] for batch in islice(train.epoch(0), BATCHES) if batch.total == train.batch_size
    ]
    found = found or [whole_batch(batch)[0] for batch in islice(train.epoch(0), 1)]
    updates = updates_of(config, parts)

    def schedule(optimizer: Optimizer) -> Any:
        return build_scheduler(config, optimizer, updates)

    def prepare(model: nn.Module) -> nn.Module:
        return for_ranks(accum, model, parts.device)

    return Problem(
        TrainerLoop(config, parts, rank_info, train.batch_size),
        parts.model,
        parts.criterion,
        found,
        cast(int, accum.steps),
        partial(build_optimizer, config, model=parts.model),
        schedule,
        config.trainer.clip_norm,
        None if accum.strategy is Strategy.standalone else prepare,
        next(parts.model.parameters()).dtype,
        parts.autocast,
        _scaling(config),
        config.seed,
        try_ignored_targets=True,
    )


def _scaling(config: Config) -> Scaling | None:
    accum = config.accum
    if accum.loss_scale is LossScaling.none:
        return None
    if accum.loss_scale is LossScaling.static:
        return Scaling(1.0, 1.0)
    return Scaling(accum.growth_factor, accum.backoff_factor, accum.growth_interval)


def _clipping(proof: Proof, config: Config, parts: Parts, rank_info: RankInfo) -> None:
    """A window that is clipped for sure, where the configuration clips at all."""
    if config.trainer.clip_norm is None:
        return
    proof.progress("clipping")
    problem, batch = proof.problem, proof.batch(0)
    exact = larger_batch_of(problem, copy_in(problem.model, DOUBLE), batch)
    half = norm(exact.gradient) / 2
    if not half > 0 or not math.isfinite(half):
        return
    loop = TrainerLoop(config, parts, rank_info, parts.splits.train.batch_size, clip_norm=half)
    clipping = replace(problem, train_window=loop, clip_norm=half)
    proof.add(compare_window(clipping, batch)[0].as_check("gradient, clipped", "to half its norm"))


def _follow(proof: Proof, config: Config, parts: Parts, rank_info: RankInfo) -> None:
    """The first updates of the real run."""
    schedule = updates_of(config, parts)
    updates = min(config.proof.updates, schedule)
    changed = small(config, rank_info, _whole(parts.model), updates)
    proof.progress(f"{updates} updates of the run, one by one")
    followed = FirstUpdates(changed, rank_info, updates, schedule, proof.progress)
    problem = replace(
        proof.problem,
        model=copy.deepcopy(followed.parts.model),
        loss=followed.parts.criterion,
        scaling=_scaling(changed),
    )
    checks, course = followed.checks(problem)
    proof.add(*checks)
    proof.causes.extend(course.causes())
    if proof.problem.dtype is not DOUBLE:
        _follow_as_it_is(proof, config, rank_info, schedule)


def _follow_as_it_is(proof: Proof, config: Config, rank_info: RankInfo, schedule: int) -> None:
    """A few updates of the real run in its own precision, its own batches and with its own callbacks."""
    name = precision_name(proof.problem)
    proof.progress(f"{REPLAYED} updates of the run in {name}")
    # A loss scale may have to fall first.
    most = REPLAYED + (MAX_SKIPPED if proof.problem.scaling is not None else 0)
    followed = FirstUpdates(as_it_is(config, most), rank_info, most, schedule, proof.progress, epoch=1)
    problem = replace(proof.problem, model=copy.deepcopy(followed.parts.model), loss=followed.parts.criterion)
    proof.add(*followed.own_precision(problem, name, REPLAYED))


def _in_our_words(cause: Cause, config: Config) -> Cause:
    """`cause` with what to do about it in this configuration's keys."""
    if cause.source == "buffers" and config.model.get("norm") == "batch" and "momentum" in config.model:
        advice = f"none needed for the pace: model.momentum={config.model['momentum']} is per update already"
        return replace(cause, advice=advice)
    if cause.source != "wrong denominator" or config.accum.reduction is not Reduction.sum:
        return cause
    advice = "accum.reduction=mean, and for updates of the same size a rate so many times as large"
    return replace(cause, advice=advice)


def _whole(model: nn.Module) -> bool:
    """Whether a smaller batch would not be the same computation: of modules with groups of a fixed size."""
    return any(hasattr(module, "statistics_groups") for module in model.modules())


def _code() -> dict[str, Any]:
    sha, diff = code_version()
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a plain checkout
            continue
    return {"versions": versions, "git_sha": sha, "changed": bool(diff)}
