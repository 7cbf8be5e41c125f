"""The experiment's configuration: what the project owns is typed here, what users bring is a `_target_`.

Imports no torch. `from_hydra` is the one place where Hydra's config ends and a plain dataclass begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UsageError, unknown_key
from .accum import AccumConfig as AccumConfig
from .accum import LossScaling as LossScaling
from .accum import Reduction as Reduction
from .accum import Strategy as Strategy
from .accum import check_accum
from .report import ReportConfig, check_report
from .sizes import AUTO, at_least, batch_sizes, processes


class Precision(Enum):
    """fp32 and fp64 are the dtype of everything; bf16 and fp16 are autocast over fp32 parameters."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp64 = "fp64"


class Backend(Enum):
    mlflow = "mlflow"
    none = "none"


@dataclass
class DataConfig:
    """Where samples come from, how they are split into train, eval and test, and how they are fed."""

    root: str = "data"
    train: dict[str, Any] = field(default_factory=dict)
    # Empty: held out of train, the same samples for every seed.
    eval: dict[str, Any] | None = field(default_factory=dict)
    eval_fraction: float = 0.1
    split_seed: int = 0
    test: dict[str, Any] = field(default_factory=dict)
    # A deterministic transform of samples or whole tensors, and the random one applied in training.
    transform: dict[str, Any] | None = field(default_factory=dict)
    augment: dict[str, Any] | None = field(default_factory=dict)
    num_classes: int = MISSING
    # What a model may ask of its data: the shape of images, or the tokens in the longest text.
    channels: int | None = MISSING
    image_size: int | None = MISSING
    length: int | None = MISSING
    # Samples in one update. Null: accum.steps x accum.micro_batch_size, or 128.
    batch_size: int | None = None
    eval_batch_size: int = 256
    drop_last: bool = False
    # Null: the whole data set on the training device if it takes a quarter of the free memory at most.
    resident: bool | None = None
    workers: int = 2
    prefetch: int = 2


@dataclass
class TrainerConfig:
    """The loop: how long, how often it looks, what it does between backward and step."""

    epochs: int = 30
    # Stop after this many updates even inside an epoch. Null: all of them.
    max_updates: int | None = None
    # Updates between two reads of the device; the tracker gets the points of those updates. Null: a
    # hundredth of the run, from 10 to 100.
    log_every: int | None = None
    eval_every: int = 1
    clip_norm: float | None = None
    check_finite: bool = True
    deterministic: bool = True
    threads: int | None = None
    # Record the window and the update as CUDA graphs, and replay them: one process, data on its GPU.
    graph: bool = False
    # torch.compile for the model.
    compile: bool = False
    # Null: a live bar on a terminal, plain lines elsewhere.
    progress: bool | None = None


@dataclass
class TrackingConfig:
    """Where runs are recorded."""

    backend: Backend = Backend.mlflow
    # Null: mlflow.db in the folder the command is run from, artifacts beside it.
    uri: str | None = None
    experiment: str = "accumexp"
    # Null: the name of the run's folder, or of a sweep's job.
    run_name: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    system_metrics: bool = True
    flush_points: int = 1000
    flush_seconds: float = 5.0


@dataclass
class ProofConfig:
    """How thoroughly a certificate looks."""

    # Updates that are followed one by one beside the larger batch's.
    updates: int = 100


@dataclass
class Config:
    """A whole experiment."""

    model: dict[str, Any] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    loss: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    accum: AccumConfig = field(default_factory=AccumConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    # A certificate before the run, kept with it: is this window the larger batch?
    prove: bool = False
    proof: ProofConfig = field(default_factory=ProofConfig)
    # The metric that names the best checkpoint and stops early, and whether it is to be "max" or "min".
    monitor: str = "eval/accuracy"
    mode: str = "max"
    seed: int = 0
    # Runs of the seeds seed, seed + 1, ..., trained together as one, each as it would be alone.
    replicas: int = 1
    device: str = "auto"
    # Null: fp16 with a loss scale, fp32 without.
    precision: Precision | None = None
    # Dtype of the parameters. Null: fp64 with precision=fp64, fp32 otherwise.
    param_precision: Precision | None = None
    resume: str | None = None


def from_hydra(cfg: DictConfig | Mapping[str, Any]) -> Config:
    """The typed, resolved and checked configuration.

    Raises:
        UsageError: naming the key, for an unknown one (with `+` too), a wrong type or a bad value.
    """
    try:
        # Merging into the schema again refuses keys that `+` has added to typed nodes.
        plain: Any = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
        _forgive_missing(plain)
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(plain))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UsageError(explain_omegaconf(error)) from error
    assert isinstance(config, Config)
    return check(config)


def _forgive_missing(plain: dict[str, Any]) -> None:
    """What data does not say of its shape is null once nothing has asked for it: text has no channels."""
    data = plain.get("data")
    for key in ("channels", "image_size", "length"):
        if isinstance(data, dict) and data.get(key) == MISSING:
            data[key] = None


def explain_omegaconf(error: OmegaConfBaseException) -> str:
    """One line for omegaconf's several: what is wrong with which key."""
    key = error.full_key or "configuration"
    reason = str(error.msg or error).splitlines()[0]
    node = error.parent_node if isinstance(error.parent_node, DictConfig) else None
    if "not in" in reason and node is not None:
        return unknown_key(key, [str(name) for name in node])
    _, asked, missing = reason.partition("Missing mandatory value: ")
    if asked and missing not in ("", key):
        return f"{key}: needs {missing}, which is not given; give {missing}=..., or a model and data that fit"
    if asked:
        return f"{key}: a value is needed, give {key}=..."
    return f"{key}: {reason}"


def check(config: Config) -> Config:
    """`config` with ranks, precision and batch sizes filled in, or a `UsageError` that names the key."""
    data, accum, trainer = config.data, config.accum, config.trainer
    standalone = accum.strategy is Strategy.standalone
    accum.processes = processes(accum.processes, standalone, config.device)
    data.batch_size, accum.steps, accum.micro_batch_size = batch_sizes(
        data.batch_size, accum.steps, accum.micro_batch_size, accum.processes
    )
    scaled = accum.loss_scale is not LossScaling.none
    if config.precision is None:
        config.precision = Precision.fp16 if scaled else Precision.fp32
    at_least(1, "data.eval_batch_size", data.eval_batch_size)
    at_least(0, "data.workers", data.workers)
    at_least(1, "data.prefetch", data.prefetch)
    at_least(1, "trainer.epochs", trainer.epochs)
    at_least(1, "trainer.max_updates", trainer.max_updates)
    at_least(1, "trainer.log_every", trainer.log_every)
    at_least(1, "trainer.eval_every", trainer.eval_every)
    at_least(1, "trainer.threads", trainer.threads)
    at_least(1, "replicas", config.replicas)
    at_least(1, "proof.updates", config.proof.updates)
    at_least(1, "tracking.flush_points", config.tracking.flush_points)
    if not 0 <= data.eval_fraction < 1:
        raise UsageError(f"data.eval_fraction={data.eval_fraction}: a fraction from 0 to below 1")
    if trainer.clip_norm is not None and not trainer.clip_norm > 0:
        raise UsageError(f"trainer.clip_norm={trainer.clip_norm}: a norm above 0, or null for no clipping")
    if config.mode not in ("max", "min"):
        raise UsageError(f"mode={config.mode}: max or min")
    if config.precision is Precision.fp16 and not scaled:
        raise UsageError("precision=fp16: needs a loss scale, accum=loss_scaled or accum.loss_scale=dynamic")
    if config.param_precision is Precision.fp16:
        raise UsageError("param_precision=fp16: a gradient of 10 bits cannot be unscaled; use fp32 or bf16")
    check_accum(accum)
    if trainer.graph and not standalone:
        raise UsageError(
            f"trainer.graph=true: a graph is recorded of one process, not of accum={accum.strategy.name}"
        )
    if trainer.graph and accum.fp32_buffers:
        raise UsageError("trainer.graph=true: not with accum.fp32_buffers=true, which moves gradients about")
    if trainer.graph and accum.recover:
        raise UsageError("accum.recover=true: not with trainer.graph=true, which records windows as they are")
    if config.replicas > 1 and not standalone:
        raise UsageError(f"replicas={config.replicas}: trains them in one process, take accum=standalone")
    if config.replicas > 1 and config.prove:
        raise UsageError(
            f"replicas={config.replicas}: a certificate is of one run, make it with python -m accumexp.prove"
        )
    for key, given in (
        ("trainer.graph=true", trainer.graph),
        ("trainer.compile=true", trainer.compile),
        (f"accum.steps={AUTO}", accum.steps == AUTO),
    ):
        if config.replicas > 1 and given:
            raise UsageError(f"{key}: is of one run, leave it out or replicas={config.replicas}")
    check_report(config.report)
    for group in ("model", "loss", "optimizer", "scheduler"):
        if "_target_" not in getattr(config, group):
            raise UsageError(f"{group}: names no class, give {group}._target_=package.Class")
    return config


def settled(config: Config, steps: int, batch_size: int | None = None) -> Config:
    """`config` with a number instead of `accum.steps=auto`, and what follows from it filled in.

    `batch_size` is another `data.batch_size`. The values of `config` itself stay as they are.
    """
    plain = to_plain(config)
    plain["accum"].update(steps=steps, micro_batch_size=None)
    plain["data"]["batch_size"] = batch_size or plain["data"]["batch_size"]
    return from_hydra(plain)


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, plain value) of every leaf of a configuration, enums by name."""
    if dataclasses.is_dataclass(node):
        node = {item.name: getattr(node, item.name) for item in dataclasses.fields(node)}
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node.name if isinstance(node, Enum) else node


def to_plain(node: Any) -> Any:
    """`node` as dicts, lists and scalars: what a YAML file or a checkpoint can hold."""
    if dataclasses.is_dataclass(node):
        return {item.name: to_plain(getattr(node, item.name)) for item in dataclasses.fields(node)}
    if isinstance(node, Mapping):
        return {str(key): to_plain(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [to_plain(value) for value in node]
    return node.name if isinstance(node, Enum) else node
