"""The experiment's configuration as dataclasses; what users bring is a `_target_` node. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from .accum import AccumConfig as AccumConfig
from .accum import LossScaling as LossScaling
from .accum import Reduction as Reduction
from .accum import Strategy as Strategy
from .report import ReportConfig


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
    # Elements of the gradient are clamped to this absolute value, once an update, after clip_norm.
    clip_value: float | None = None
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
