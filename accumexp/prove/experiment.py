"""An experiment's certificate: the proof of its own loop, on its own data, and of its first updates."""

from __future__ import annotations

import copy
import importlib.metadata
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import torch
from torch import nn

from ..config.loading import to_plain
from ..config.schema import Config, LossScaling, Reduction, Strategy
from ..environment.code_version import code_version
from ..environment.ranks import RankInfo
from ..errors import UsageError
from ..proof import Cause, Certificate, Scaling
from ..proof.certify import FOLLOWED, Proof, undisturbed
from ..proof.environment import precision_name
from ..proof.gradients import DOUBLE, TRIES, gradient_check
from ..proof.larger_batch import norm
from ..proof.problem import Problem
from ..proof.problem import cast as in_dtype
from ..proof.rounding import in_precision, narrowed
from ..training.experiment import Experiment
from .first_updates import FirstUpdates, as_it_is, small, whole_batch
from .trainer_loop import TrainerLoop

# Batches that single windows are tried on.
BATCHES = 5
VERSIONS = ("accumexp", "torch", "torchvision", "numpy")


def prove_experiment(
    config: Config, rank_info: RankInfo, stage: Callable[[str], None]
) -> tuple[Certificate, Experiment]:
    """The certificate of the experiment that `config` describes, and the experiment.

    Collective: all ranks must call. Changes the experiment's data and torch's random state.

    Raises:
        UsageError: naming the key that cannot be built, or if the larger batch does not fit the device.
    """
    experiment = Experiment.build(config, rank_info)
    problem = problem_of(experiment)
    proof = Proof(problem, stage, problem.steps if config.accum.reduce_every_micro_batch else 1)
    try:
        with undisturbed(problem):
            proof.draws()
            proof.windows(alone=False)
            _clipping(proof, experiment)
            _follow(proof, experiment)
            proof.diagnosis()
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"data.batch_size={config.data.batch_size}: the proof computes the larger batch in one piece, in "
            f"fp64, and {experiment.device} has no room for it; prove with device=cpu, or with a smaller "
            "batch in as many accum.steps"
        ) from error
    except ValueError as error:
        raise UsageError(f"prove: {error}") from error
    found = proof.result()
    found = replace(found, causes=[_in_our_words(cause, config) for cause in found.causes])
    environment = {**found.environment, **_code()}
    return replace(found, environment=environment, config=to_plain(config)), experiment


def problem_of(experiment: Experiment) -> Problem:
    """What the experiment's loop should do, on the first batches of its first epoch."""
    config, train = experiment.config, experiment.splits.train
    found = [
        whole_batch(batch)[0] for batch in islice(train.epoch(0), BATCHES) if batch.total == train.batch_size
    ]
    found = found or [whole_batch(batch)[0] for batch in islice(train.epoch(0), 1)]
    return Problem(
        TrainerLoop(experiment),
        experiment.model,
        experiment.criterion,
        found,
        cast(int, config.accum.steps),
        experiment.optimizer,
        experiment.schedule,
        config.trainer.clip_norm,
        None if config.accum.strategy is Strategy.standalone else experiment.prepared_model,
        next(experiment.model.parameters()).dtype,
        experiment.autocast,
        _scaling(config),
        config.seed,
        ignores=True,
    )


def _scaling(config: Config) -> Scaling | None:
    accum = config.accum
    if accum.loss_scale is LossScaling.none:
        return None
    if accum.loss_scale is LossScaling.static:
        return Scaling(1.0, 1.0)
    return Scaling(accum.growth_factor, accum.backoff_factor, accum.growth_interval)


def _clipping(proof: Proof, experiment: Experiment) -> None:
    """A window that is clipped for sure, where the configuration clips at all."""
    if experiment.config.trainer.clip_norm is None:
        return
    proof.progress("clipping")
    problem, batch = proof.problem, proof.batch(0)
    exact = in_precision(problem, narrowed(problem.model, DOUBLE), in_dtype(batch, DOUBLE), DOUBLE)
    half = norm(exact.gradient) / 2
    if not half > 0 or not math.isfinite(half):
        return
    loop = TrainerLoop(experiment, clip_norm=half)
    clipping = replace(problem, train_window=loop, clip_norm=half)
    proof.add(gradient_check("gradient, clipped", clipping, batch, "to half its norm")[0])


def _follow(proof: Proof, experiment: Experiment) -> None:
    """The first updates of the real run."""
    updates = min(experiment.config.proof.updates, experiment.updates)
    changed = small(experiment.config, experiment.rank_info, _whole(experiment.model), updates)
    proof.progress(f"{updates} updates of the run, one by one")
    followed = FirstUpdates(
        Experiment.build(changed, experiment.rank_info), updates, experiment.updates, proof.progress
    )
    problem = replace(
        proof.problem,
        model=copy.deepcopy(followed.experiment.model),
        loss=followed.experiment.criterion,
        scaling=_scaling(changed),
    )
    checks, course = followed.checks(problem)
    proof.add(*checks)
    proof.causes.extend(course.causes())
    if proof.problem.dtype is not DOUBLE:
        _follow_as_it_is(proof, experiment)


def _follow_as_it_is(proof: Proof, experiment: Experiment) -> None:
    """A few updates of the real run in its own precision, its own batches and with its own callbacks."""
    name = precision_name(proof.problem)
    proof.progress(f"{FOLLOWED} updates of the run in {name}")
    # A loss scale may have to fall first.
    most = FOLLOWED + (TRIES if proof.problem.scaling is not None else 0)
    unchanged = Experiment.build(as_it_is(experiment.config, most), experiment.rank_info)
    followed = FirstUpdates(unchanged, most, experiment.updates, proof.progress, epoch=1)
    problem = replace(proof.problem, model=copy.deepcopy(unchanged.model), loss=unchanged.criterion)
    proof.add(*followed.own_precision(problem, name, FOLLOWED))


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
