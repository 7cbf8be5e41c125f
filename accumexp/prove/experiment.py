"""An experiment's certificate: the proof of its loop on its data, and of its first updates."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import torch

from ..config.loading import to_plain
from ..config.schema import Config, LossScaling, Reduction, Strategy
from ..environment.code_version import code_version
from ..environment.ranks import RankInfo
from ..errors import UsageError, compiler_error
from ..proof import Cause, Certificate, Scaling
from ..proof.checks import REPLAYED, Proof
from ..proof.float64 import DOUBLE
from ..proof.gradients import MAX_SKIPPED, compare_window
from ..proof.larger_batch import norm
from ..proof.problem import Problem, copy_in, forked_rng, is_large
from ..proof.rounding import larger_batch_of
from ..training.experiment import Experiment
from ..training.preflight import try_example
from .first_updates import BEYOND, EPOCH, FirstUpdates, fp64_config, own_precision_config
from .trainer_loop import TrainerLoop
from .update_observer import gathered_batch

# Batches for the checks of single windows.
BATCHES = 5
# Updates that are compared in fp64 by default.
UPDATES, UPDATES_IF_LARGE = 100, 36
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
    with closing(experiment.splits):
        return _certificate(experiment, stage), experiment


def _certificate(experiment: Experiment, stage: Callable[[str], None]) -> Certificate:
    config = experiment.config
    try_example(experiment)
    problem = problem_of(experiment)
    proof = Proof(problem, stage, problem.steps if config.accum.reduce_every_micro_batch else 1)
    try:
        with forked_rng(problem.device), torch.enable_grad():
            proof.fix_draws()
            proof.check_windows(replay=False)
            _check_clipping(proof, experiment)
            _replay_float64(proof, experiment)
            if problem.dtype is not DOUBLE:
                _replay_own_precision(proof, experiment)
            proof.find_causes()
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"data.batch_size={config.data.batch_size}: the proof computes the larger batch in one piece, in "
            f"fp64, and {experiment.device} has no room for it; prove with device=cpu, or with a smaller "
            "batch in as many accum.steps"
        ) from error
    except ValueError as error:
        raise UsageError(f"prove: {error}") from error
    except Exception as error:
        if explained := compiler_error(error):
            raise explained from error
        raise
    certificate = proof.result()
    causes = [_with_advice(cause, config) for cause in certificate.causes]
    environment = {**certificate.environment, **_code_versions()}
    return replace(certificate, causes=causes, environment=environment, config=to_plain(config))


def problem_of(experiment: Experiment) -> Problem:
    """The problem of the experiment's loop, on the first batches of its first epoch."""
    config, train = experiment.config, experiment.splits.train
    first = [(gathered_batch(batch)[0], batch.total) for batch in islice(train.epoch(0), BATCHES)]
    full = [batch for batch, total in first if total == train.batch_size]
    return Problem(
        TrainerLoop(experiment),
        experiment.model,
        experiment.criterion,
        full or [first[0][0]],
        cast(int, config.accum.steps),
        experiment.optimizer,
        experiment.schedule,
        config.trainer.clip_norm,
        None if config.accum.strategy is Strategy.standalone else experiment.prepared_model,
        next(experiment.model.parameters()).dtype,
        experiment.autocast,
        _scaling(config),
        config.seed,
        try_ignored_targets=True,
        clip_value=config.trainer.clip_value,
        compiled=config.trainer.compile,
    )


def _scaling(config: Config) -> Scaling | None:
    accum = config.accum
    if accum.loss_scale is LossScaling.none:
        return None
    if accum.loss_scale is LossScaling.static:
        return Scaling(1.0, 1.0)
    return Scaling(accum.growth_factor, accum.backoff_factor, accum.growth_interval)


def _check_clipping(proof: Proof, experiment: Experiment) -> None:
    """Checks a window that is clipped to half its norm, if the configuration clips at all."""
    if experiment.config.trainer.clip_norm is None:
        return
    proof.progress("clipping")
    problem, batch = proof.problem, proof.batch(0)
    half = norm(larger_batch_of(problem, copy_in(problem.model, DOUBLE), batch).gradient) / 2
    if half > 0 and math.isfinite(half):
        loop = TrainerLoop(experiment, clip_norm=half)
        clipping = replace(problem, train_window=loop, clip_norm=half)
        comparison, observation, expected = compare_window(clipping, batch)
        proof.keep_failure(batch, comparison, observation, expected, "whole size, clipped to half its norm")
        proof.add(comparison.as_check("gradient, clipped", "to half its norm"))


def _replay_float64(proof: Proof, experiment: Experiment) -> None:
    """Checks the run's first updates in fp64."""
    updates = experiment.config.proof.updates or (UPDATES_IF_LARGE if is_large(experiment.model) else UPDATES)
    updates = min(updates, experiment.updates)
    # Modules with groups of a fixed size compute something else on a smaller batch.
    whole = any(hasattr(module, "statistics_groups") for module in experiment.model.modules())
    config = fp64_config(experiment.config, experiment.rank_info, updates, whole)
    proof.progress(f"{updates} updates of the run, one by one")
    epoch = EPOCH if updates >= EPOCH + BEYOND else max(1, updates // 3)
    first_updates = FirstUpdates(config, experiment, proof.progress, epoch)
    with closing(first_updates):
        problem = replace(first_updates.problem(proof.problem), scaling=_scaling(config))
        replay, checks = first_updates.replay_float64(problem)
    proof.keep_replay(replay)
    proof.add(*checks)


def _replay_own_precision(proof: Proof, experiment: Experiment) -> None:
    """Checks a few of the run's first updates in its precision, with its batches and callbacks."""
    name = proof.problem.precision_name
    proof.progress(f"{REPLAYED} updates of the run in {name}")
    most = REPLAYED + (MAX_SKIPPED if proof.problem.scaling is not None else 0)
    config = own_precision_config(experiment.config, most)
    first_updates = FirstUpdates(config, experiment, proof.progress, epoch=1)
    with closing(first_updates):
        problem = first_updates.problem(proof.problem)
        proof.keep_own_replay(first_updates.replay_own_precision(problem, REPLAYED))


def _with_advice(cause: Cause, config: Config) -> Cause:
    """`cause` with advice in this configuration's keys."""
    if cause.source == "buffers" and config.model.get("norm") == "batch" and "momentum" in config.model:
        advice = f"none needed for the pace: model.momentum={config.model['momentum']} is per update already"
        return replace(cause, advice=advice)
    if cause.source != "wrong denominator" or config.accum.reduction is not Reduction.sum:
        return cause
    advice = "accum.reduction=mean, and for updates of the same size a rate so many times as large"
    return replace(cause, advice=advice)


def _code_versions() -> dict[str, Any]:
    sha, diff = code_version()
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a plain checkout
            continue
    return {"versions": versions, "git_sha": sha, "changed": bool(diff)}
