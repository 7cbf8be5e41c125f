"""The objects that single nodes of a configuration name: model, metrics, callbacks, loss scale, device."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..accum import LossScale
from ..accum.loss import WeightedSamples
from ..config.instantiate import build
from ..config.schema import AccumConfig, Config, LossScaling, Precision, Strategy
from ..data import Placement
from ..environment.device import pick_device
from ..environment.random_state import drawn_from
from ..environment.ranks import RankInfo, device_of
from ..errors import UsageError
from .callbacks import EMA, Best, Callback
from .metrics import Metrics, is_metric

# Names of `train/*`, `eval/*` and `final/*` that no metric may have.
OWN_VALUES = {
    *("loss", "lr", "grad_norm", "noise_scale", "gradient_variance", "gradient_square"),
    *("test_samples", "updates", "epochs", "samples", "seconds", "samples_per_second", "update_ms"),
    *("activation_mib", "peak_memory_mib"),
}
# The splits of a `monitor`: test only where it is asked for.
MONITORED = ("eval", "test")
DTYPES = {
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
    Precision.fp64: torch.float64,
}


def placement(config: Config, rank_info: RankInfo) -> Placement:
    """The device of this rank and the dtype of parameters and inputs."""
    precision = config.param_precision
    if precision is None:
        precision = Precision.fp64 if config.precision is Precision.fp64 else Precision.fp32
    return Placement(pick_device(device_of(config.device, rank_info)), DTYPES[precision])


def autocast_dtype(precision: Precision | None, parameters: torch.dtype) -> torch.dtype | None:
    """The dtype of `torch.autocast`, None where the parameters have that of the computation."""
    if precision not in (Precision.bf16, Precision.fp16) or parameters is DTYPES[precision]:
        return None
    return DTYPES[precision]


def build_model(config: Config) -> nn.Module:
    """The model, on the device and in the dtype that its class gives it.

    Raises:
        UsageError: naming the key that cannot be built.
    """
    split = {"window_steps": config.accum.steps, "micro_batch_size": config.accum.micro_batch_size}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        model = build(config.model, "model", **split)
    if not isinstance(model, nn.Module):
        made = f"{config.model['_target_']} made a {type(model).__name__}"
        raise UsageError(f"model: {made}, a torch.nn.Module is needed")
    return model


def ignored_label(config: Config) -> int | None:
    """The label that the loss ignores, None for a loss that has none.

    The loss is built for it with draws of its own, which leave the run's generators alone.
    """
    try:
        with drawn_from(0):
            label = getattr(build(config.loss, "loss"), "ignore_index", None)
    except UsageError:  # reported in its turn
        return None
    if isinstance(label, str):
        raise UsageError(f"loss.ignore_index={label}: a whole number is needed")
    return label if isinstance(label, int) else None


def build_loss(config: Config, device: torch.device, dtype: torch.dtype) -> Any:
    """The criterion of `loss`, with `data.weight` as weighted by the sample.

    Raises:
        UsageError: if it cannot be built or weighted.
    """
    criterion = build(config.loss, "loss")
    if config.data.weight is not None:
        try:
            criterion = WeightedSamples(criterion)
        except ValueError as error:
            reason = f"{error}; take a loss of torch with reduction=mean, or weigh in a loss of your own"
            raise UsageError(f"data.weight={config.data.weight}: {reason}") from error
    return criterion.to(device, dtype) if isinstance(criterion, nn.Module) else criterion


def build_metrics(config: Config, device: torch.device) -> Metrics:
    """The metrics of `metrics`, by their names there; those that can ignore what the loss ignores.

    Raises:
        UsageError: naming the key that cannot be built.
    """
    metrics: dict[str, Any] = {}
    ignored = ignored_label(config)
    offered = {} if ignored is None else {"ignore_index": ignored}
    for name, node in config.metrics.items():
        if name in OWN_VALUES or str(name).startswith("eval_"):
            raise UsageError(
                f"metrics.{name}: the run records a value of its own as {name}, take another name"
            )
        metric = build(node, f"metrics.{name}", **offered)
        if not is_metric(metric):
            raise UsageError(f"metrics.{name}: a torchmetrics Metric is needed, not {type(metric).__name__}")
        metrics[name] = metric
    return Metrics(metrics, device)


def build_loss_scale(accum: AccumConfig, device: torch.device) -> LossScale | None:
    """The loss scale of `accum`, or None.

    Raises:
        UsageError: naming the setting that cannot work.
    """
    if accum.loss_scale is LossScaling.none:
        return None
    try:
        return LossScale(
            accum.init_scale,
            dynamic=accum.loss_scale is LossScaling.dynamic,
            growth_factor=accum.growth_factor,
            backoff_factor=accum.backoff_factor,
            growth_interval=accum.growth_interval,
            min_scale=accum.min_scale,
            device=device,
        )
    except ValueError as error:
        raise UsageError(f"accum.{error}") from error


def build_callbacks(config: Config, has_eval: bool = True) -> dict[str, Callback]:
    """The callbacks of `callbacks` that are not null, by their names there.

    Args:
        has_eval: whether there are samples to evaluate on.

    Raises:
        UsageError: naming the key that cannot be built, or a `monitor` that is never evaluated.
    """
    callbacks: dict[str, Any] = {}
    for name, node in config.callbacks.items():
        if node is None:
            continue
        callbacks[name] = build(node, f"callbacks.{name}")
        if isinstance(callbacks[name], EMA) and config.accum.strategy is Strategy.fsdp:
            raise UsageError(
                f"callbacks.{name}: keeps a second whole model, which accum=fsdp has no room for"
            )
        if not isinstance(callbacks[name], Callback):
            raise UsageError(f"callbacks.{name}: {node['_target_']} is no accumexp.callbacks.Callback")
    evaluated = {"loss", *config.metrics, *(name for c in callbacks.values() for name in c.evaluates)}
    # Of a metric with several values or a loss of several terms, one: eval/<name>/<index>.
    split, _, name = config.monitor.partition("/")
    if split not in MONITORED or name.removeprefix("ema_").partition("/")[0] not in evaluated:
        choices = ", ".join(f"eval/{name}" for name in sorted(evaluated))
        raise UsageError(f"monitor={config.monitor}: this run evaluates {choices}")
    _check_monitors(config, callbacks, evaluated, has_eval)
    return callbacks


def check_monitored(key: str, monitor: str, has_eval: bool) -> None:
    """
    Raises:
        UsageError: naming `key`, if `monitor` is of an eval split and there is none.
    """
    if monitor.startswith("eval/") and not has_eval:
        raise UsageError(
            f"{key}={monitor}: there is no eval split, data.eval_fraction=0 holds no samples out; give "
            f"data.eval, hold some out, or ask for monitor={monitor.replace('eval/', 'test/', 1)}"
        )


def _check_monitors(
    config: Config, callbacks: dict[str, Callback], evaluated: set[str], has_eval: bool
) -> None:
    """Refuses a monitor of a metric that nothing evaluates."""
    available = {f"{split}/{name}" for name in evaluated for split in MONITORED}
    averaged = {f"{split}/ema_{name}" for name in evaluated for split in MONITORED}
    if any(isinstance(callback, EMA) for callback in callbacks.values()):
        available |= averaged
    adds = (type(callback).evaluated for callback in callbacks.values())
    others = any(not method.__module__.startswith("accumexp.") for method in adds)
    monitors = {"monitor": config.monitor}
    for name, callback in callbacks.items():
        best = getattr(callback, "best", None)
        if isinstance(best, Best):
            monitors[f"callbacks.{name}.monitor"] = best.monitor
            if not callback.saves:  # one that saves keeps the last, too
                check_monitored(f"callbacks.{name}.monitor", best.monitor, has_eval)
    for key, monitor in monitors.items():
        whole = "/".join(monitor.split("/")[:2])
        if whole in available or others and key != "monitor":
            continue
        if whole in averaged:
            raise UsageError(
                f"{key}={monitor}: nothing averages the weights, add callbacks=ema or take "
                f"{monitor.replace('ema_', '', 1)}"
            )
        choices = ", ".join(sorted(name for name in available if name.startswith("eval/")))
        raise UsageError(f"{key}={monitor}: this run evaluates {choices}")
