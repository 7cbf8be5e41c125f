"""Faults of a configuration that would end a run in the middle, found before its first update."""

from __future__ import annotations

import copy
import logging
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..accum import call, is_out_of_memory, tensors
from ..accum.batch import map_tensors, rank_share, steps_for
from ..accum.choose_objective import trained_parameters
from ..accum.loss import ClassIndexLoss, WeightedSamples
from ..accum.terms import has_terms
from ..accum.window_norm import WindowBatchNorm
from ..config.schema import Reduction, Strategy
from ..data import Batches, StreamedBatches
from ..data.labels import ClassIndices, Probabilities, TargetCheck
from ..environment.cores import cores, most_workers
from ..environment.random_state import random_state, restore_random_state
from ..errors import TrainingError, UsageError, compiler_error, first_line
from .class_checks import check_accuracy, check_class_loss, is_class_loss
from .evaluated_schedule import takes_metric
from .evaluation import plain_values, precision, unweighted
from .losses import Regression

if TYPE_CHECKING:
    from .experiment import Experiment

log = logging.getLogger(__name__)
TRIED_STEPS = 1000


def check_experiment(experiment: Experiment, changed: Collection[str] = ()) -> Any:
    """Refuses or warns of what would come up only in the middle of a run.

    Args:
        changed: the settings that a resumed run changes, by dotted key.

    Returns:
        The model's outputs on a few samples, None if they were not computed.

    Raises:
        UsageError: naming the key, for a model, loss or metric that fails on samples of the data, a schedule
            that fails or ends before the run, a micro-batch of one sample that BatchNorm refuses, or a
            setting that norms over the window exclude.
    """
    train, ranks = experiment.splits.train, experiment.rank_info
    check_window_norms(experiment)
    outputs = try_example(experiment)
    if outputs is not None and ranks.first and (warning := average_warning(experiment, outputs)):
        log.warning(warning)
    try_schedule(experiment, changed)
    steps = cast(int, experiment.config.accum.steps)
    check_batch_statistics(experiment.model, train, steps, ranks.size, experiment.autocast)
    warning = workers_warning(experiment.config.data.workers, ranks.local_size)
    if warning and ranks.first and isinstance(train, StreamedBatches):
        log.warning(warning)
    return outputs


def check_window_norms(experiment: Experiment) -> None:
    """Raises a `UsageError` that names a setting with which norms over the window cannot be exact."""
    config = experiment.config
    if not any(isinstance(module, WindowBatchNorm) for module in experiment.model.modules()):
        return
    why = "its passes end early at a norm, which"
    excluded = {
        "accum=fsdp": (config.accum.strategy is Strategy.fsdp, f"{why} a fully sharded model cannot"),
        "trainer.compile=true": (config.trainer.compile, f"{why} compiled code cannot"),
        "trainer.graph=true": (config.trainer.graph, f"{why} a recorded graph cannot"),
        "replicas": (config.replicas > 1, "its passes are those of one model"),
    }
    for key, (given, reason) in excluded.items():
        if given:
            raise UsageError(f"{key}: the model has BatchNorm over the window, and {reason}; leave it out")


def check_loss_parameters(experiment: Experiment) -> None:
    """Raises a `UsageError` for a loss with trained parameters: an optimizer gets those of the model."""
    if names := trained_parameters(experiment.criterion):
        raise UsageError(
            f"loss ({experiment.config.loss['_target_']}): no optimizer trains its parameters "
            f"{', '.join(names)}; make them parameters of the model, or set their requires_grad to false"
        )


def try_example(experiment: Experiment, split: str = "train") -> Any:
    """Tries model, loss and metrics on a few samples of `split`, as an evaluation does.

    Returns the model's outputs, or None if they were not computed.

    All targets that are in memory are checked against the model's outputs, the others as they are read.
    Modes, buffers and the random state are left as they were. Nothing is concluded from a lack of memory.

    Raises:
        UsageError: naming the key of the one that fails, or a sample whose target the loss does not take.
    """
    splits, model, loss = experiment.splits, experiment.model, experiment.loss
    example, when = getattr(splits, split).example, f"on samples of data.{split}"
    if example is None or any(map(is_lazy, [*model.parameters(), *model.buffers()])):
        return None
    check_loss_parameters(experiment)
    inputs, targets = example
    outputs = None
    device = tensors(targets)[0].device
    parts = [model, *([loss] if isinstance(loss, nn.Module) else [])]
    modules = [(module, module.training) for part in parts for module in part.modules()]
    buffers = [(buffer, buffer.clone()) for part in parts for buffer in part.buffers()]
    state = random_state()
    model.eval()
    try:
        with torch.no_grad(), precision(experiment.autocast, device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metrics that see too few samples
            with named_by("model", experiment.config.model, when):
                outputs = call(model, inputs)
            check_class_loss(experiment.criterion, outputs, targets)
            if check := target_check(experiment.criterion, outputs):
                for batches in (splits.train, splits.eval, splits.test):
                    batches.check_targets(check)
            with named_by("loss", experiment.config.loss, when):
                total = loss.total(outputs, targets)
            if total.numel() != 1:
                raise UsageError(f"loss: its value has shape {tuple(total.shape)}, one number is needed")
            for name, metric in experiment.evaluator.metrics.items():
                with named_by(f"metrics.{name}", experiment.config.metrics[name], when):
                    check_accuracy(f"metrics.{name}", metric, outputs, unweighted(loss, targets))
                    metric.update(outputs, unweighted(loss, targets))
            if experiment.rank_info.size == 1:
                _check_values(experiment)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    finally:
        experiment.evaluator.metrics.reset()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, mode in modules:
            module.training = mode
        restore_random_state(state)
    return outputs


def average_warning(experiment: Experiment, outputs: Any) -> str | None:
    """The warning of a loss that the window weighs by samples and that averages over something else, or None.

    Measured on the example that gave `outputs`. None for one micro-batch, which is the larger batch.
    """
    criterion, example = experiment.criterion, experiment.splits.train.example
    accum = experiment.config.accum
    inner = criterion.criterion if isinstance(criterion, Regression) else criterion
    additive = type(experiment.loss) in (ClassIndexLoss, WeightedSamples)
    additive = additive or type(inner).__module__ == nn.MSELoss.__module__ or has_terms(experiment.loss)
    alone = cast(int, accum.steps) * experiment.rank_info.size == 1
    if example is None or additive or alone or accum.reduction is Reduction.sum:
        return None
    from ..proof.additivity import loss_average  # the proof, only for losses that are not known

    average = loss_average(criterion, outputs, example[1], experiment.model, example[0])
    if average is None:
        return None
    return f"loss ({experiment.config.loss['_target_']}): {average.reason}; {average.advice}"


def target_check(criterion: Any, outputs: Any) -> TargetCheck | None:
    """What `criterion`, or the one that it wraps, demands of targets for `outputs`; None if not known."""
    if isinstance(criterion, WeightedSamples):
        criterion = criterion.criterion
    name, forward = type(criterion).__name__, getattr(type(criterion), "forward", None)
    if forward in (nn.BCELoss.forward, nn.BCEWithLogitsLoss.forward):
        return Probabilities(name)
    if not is_class_loss(criterion) or not isinstance(outputs, Tensor):
        return None
    classes = outputs.shape[1] if outputs.dim() > 1 else outputs.shape[0]
    return ClassIndices(classes, criterion.ignore_index, outputs.dim() - 1, name)


def _check_values(experiment: Experiment) -> None:
    """Refuses metrics that cannot be recorded or monitored. What fails on few samples may not on more."""
    try:
        values = plain_values(experiment.evaluator.metrics)
    except TrainingError as error:
        raise UsageError(str(error)) from error
    except Exception:
        log.debug("metrics of a few samples failed", exc_info=True)
        return
    monitor = experiment.config.monitor
    split, _, name = monitor.partition("/")
    name = name.removeprefix("ema_")
    if name != "loss" and name not in values:
        each = [f"{split}/{other}" for other in values if other.startswith(f"{name.partition('/')[0]}/")]
        if each:
            raise UsageError(f"monitor={monitor}: has several values, take one of {each[0]} to {each[-1]}")


def try_schedule(experiment: Experiment, changed: Collection[str] = ()) -> None:
    """Steps a schedule of the run's configuration through its first updates.

    Raises:
        UsageError: naming the key, if it fails, ends before the run, or sets a rate that was given otherwise.
    """
    node = experiment.config.scheduler
    if takes_metric(node):
        return
    name, updates = str(node["_target_"]).rpartition(".")[2], experiment.updates
    optimizer = experiment.optimizer()
    given = [group["lr"] for group in optimizer.param_groups]
    schedule = experiment.schedule(optimizer)
    total = getattr(schedule, "total_steps", None)
    if isinstance(total, int) and total < updates:
        raise UsageError(f"scheduler.total_steps={total}: the run has {updates} updates; give as many")
    if any(
        group.get("initial_lr", rate) != rate
        for group, rate in zip(optimizer.param_groups, given, strict=True)
    ):
        text = f"optimizer.lr={given[0]:g}: has no effect with {name}, which sets its own rates"
        if "optimizer.lr" in changed:
            raise UsageError(f"{text}; leave it out")
        if experiment.rank_info.first:
            log.warning(text)
    with warnings.catch_warnings(), named_by("scheduler", node, "when it is stepped"):
        warnings.simplefilter("ignore")  # that no update came before
        for _ in range(min(updates, TRIED_STEPS)):
            schedule.step()


@contextmanager
def named_by(key: str, node: Mapping[str, Any], when: str = "on samples of data.train") -> Iterator[None]:
    """Turns an error of the object that `node` describes into one that names its key and the place.

    Raises:
        UsageError: in place of the original error.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if is_out_of_memory(error) or compiler_error(error):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        kind = type(error).__name__
        text = first_line(error)
        reason = kind if text == kind else f"{kind}: {text}"
        raise UsageError(
            f"{key} ({node['_target_']}): fails {when}: {reason} ({where}); "
            "ACCUMEXP_TRACEBACK=1 shows the calls"
        ) from error


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
    with_statistics = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    over_window = all(isinstance(module, WindowBatchNorm) for module in with_statistics)
    smallest = smallest_micro_batch(train, 1, 1) if over_window else smallest_micro_batch(train, steps, ranks)
    if not with_statistics or smallest > 1:
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
    line = f"data.workers={workers}{each}: this machine has {available} cores, take data.workers={best}"
    return f"{line}; {most_workers()} are started" if workers > most_workers() else line
