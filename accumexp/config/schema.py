"""The experiment's configuration as dataclasses; users' classes are `_target_` nodes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from .ranges import LARGEST, count, number

# Below the largest number of fp32, the dtype of the scale.
LARGEST_SCALE = 2.0**127


class Reduction(Enum):
    mean = "mean"
    sum = "sum"


class Strategy(Enum):
    """standalone is one process; ddp replicates the model in every rank, fsdp spreads it over them."""

    standalone = "standalone"
    ddp = "ddp"
    fsdp = "fsdp"


class LateWeights(Enum):
    first_pass = "first_pass"
    gradients = "gradients"


class LossScaling(Enum):
    none = "none"
    static = "static"
    dynamic = "dynamic"


@dataclass
class AccumConfig:
    """How one update's batch becomes a window."""

    strategy: Strategy = Strategy.standalone
    # Micro-batches in a window and samples in a micro-batch; of these two and data.batch_size,
    # any two give the third. steps=auto: the fewest with a micro-batch that fits in memory.
    steps: int | str | None = None
    micro_batch_size: int | None = count(None)
    # Limit of the tensors on a rank's device for steps=auto: bytes, or 2GiB, 500MiB, 24GB. Null: free memory.
    memory_limit: int | str | None = None
    reduction: Reduction = Reduction.mean
    # Weights of a loss's terms that depend on the outputs: counted in a forward pass of their own, or with a
    # gradient buffer and a backward for each such term.
    late_weights: LateWeights = LateWeights.first_pass
    # Accumulate the gradients of bf16 parameters in fp32: one more fp32 buffer per such parameter.
    fp32_buffers: bool = False
    # Ranks. Null: as many as torchrun or the cluster started; else one per GPU, or two without a GPU.
    processes: int | None = count(None, at_most=65536)
    # With a loss scale, an overflow in any micro-batch on any rank skips the window on all ranks.
    loss_scale: LossScaling = LossScaling.none
    init_scale: float = number(65536.0, above=0, below=LARGEST_SCALE)
    growth_factor: float = number(2.0, above=1, below=LARGEST_SCALE)
    backoff_factor: float = number(0.5, above=0, below=1)
    # Updates without an overflow after which a dynamic scale grows.
    growth_interval: int = count(2000)
    min_scale: float = number(1.0, above=0, below=LARGEST_SCALE)
    # ddp: look for parameters that a forward pass did not use. Walks the graph once per window. Not needed
    # where windows are recovered from out of memory (`recover`) or have fp32 buffers.
    find_unused_parameters: bool = False
    # fsdp: reduce-scatter in every micro-batch, so that no unsharded gradient is kept between them.
    reduce_every_micro_batch: bool = False
    # Out of memory splits this window and the following ones finer, on all ranks. Null: except with fsdp, and
    # with reduction=sum, whose update grows with the steps.
    recover: bool | None = None

    @property
    def recovers(self) -> bool:
        if self.recover is not None:
            return self.recover
        return self.strategy is not Strategy.fsdp and self.reduction is Reduction.mean


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
    """Data sets, their split into train, eval and test, and their loading."""

    root: str = "data"
    train: dict[str, Any] = field(default_factory=dict)
    # Empty: held out of train, the same samples for every seed.
    eval: dict[str, Any] | None = field(default_factory=dict)
    eval_fraction: float = number(0.1, at_least=0, below=1)
    split_seed: int = count(0, at_least=0, at_most=LARGEST)
    test: dict[str, Any] = field(default_factory=dict)
    # A deterministic transform of samples or whole tensors, and the random one applied in training.
    transform: dict[str, Any] | None = field(default_factory=dict)
    augment: dict[str, Any] | None = field(default_factory=dict)
    # Of a classification; a regression has none.
    num_classes: int | None = count(MISSING, at_least=0)
    # The shape of samples, for models that need it: of images, or the tokens in the longest text.
    channels: int | None = count(MISSING, at_most=65536)
    image_size: int | None = count(MISSING, at_most=16384)
    length: int | None = count(MISSING, at_most=2**20)
    # Samples in one update. Null: accum.steps x accum.micro_batch_size, or 128.
    batch_size: int | None = count(None)
    eval_batch_size: int = count(256)
    # Parts of a sample by name (dicts, named tuples, dataclasses) or position (tuples): the target, the
    # sample's weight in the loss, and the inputs. Null: the last part, none, and all the rest.
    target: Any = None
    weight: Any = None
    inputs: list[Any] | None = None
    # Makes a batch of a list of samples; the order of the training samples, as positions in their split.
    collate: dict[str, Any] | None = field(default_factory=dict)
    sampler: dict[str, Any] | None = field(default_factory=dict)
    # Samples of a stream (IterableDataset) to train on. Null: its len(), or counted once.
    samples: int | None = count(None, at_most=LARGEST)
    drop_last: bool = False
    # Null: the whole data set on the training device if it takes a quarter of the free memory at most.
    resident: bool | None = None
    workers: int = count(2, at_least=0, at_most=1024)
    prefetch: int = count(2, at_most=1024)


@dataclass
class TrainerConfig:
    """The training loop: its length, its logging and evaluation, clipping and compilation."""

    epochs: int = count(30)
    # Stop after this many updates even inside an epoch. Null: all of them.
    max_updates: int | None = count(None, at_most=LARGEST)
    # Updates between two reads of the device, and between two points in the tracker. Null: a hundredth of the
    # run, from 10 to 100.
    log_every: int | None = count(None)
    eval_every: int = count(1)
    clip_norm: float | None = number(None, above=0)
    # Elements of the gradient are clamped to this absolute value, once an update, after clip_norm.
    clip_value: float | None = number(None, above=0)
    check_finite: bool = True
    deterministic: bool = True
    threads: int | None = count(None, at_most=4096)
    # Record the window and the update as CUDA graphs, and replay them: one process, data on its GPU.
    graph: bool = False
    # torch.compile for the model.
    compile: bool = False
    # Null: a line every 100 updates, and a live bar on a terminal. False: neither.
    progress: bool | None = None


@dataclass
class TrackingConfig:
    """Where runs are recorded."""

    backend: Backend = Backend.mlflow
    # Null: that of MLFLOW_TRACKING_URI, or mlflow.db in the folder of the command, artifacts beside it.
    uri: str | None = None
    # Null: that of MLFLOW_EXPERIMENT_NAME, or "accumexp".
    experiment: str | None = None
    # Null: the name of the run's folder, or of a sweep's job.
    run_name: str | None = None
    tags: dict[str, str] = field(default_factory=dict)
    system_metrics: bool = True
    flush_points: int = count(1000)
    flush_seconds: float = number(5.0, at_least=0)


@dataclass
class ReportConfig:
    """The metric and the statistical tests of a sweep's report. Set them before the sweep runs."""

    # Whether the end of a sweep writes page, pictures and CSV; if not, it only prints the tables.
    write: bool = True
    # A key of final/*. Null: the metric of `monitor`; else accuracy, else loss.
    metric: str | None = None
    # The largest difference that does not matter, in points (hundredths) of accuracy or in the metric's unit.
    # Null: half a point for an accuracy; for another metric 1 % of the reference's mean value.
    margin: float | None = number(None, above=0)
    # Of all intervals. 1 - confidence bounds the probability that any claim of a kind (equivalent, different)
    # is wrong.
    confidence: float = number(0.95, at_least=0.5, below=1)
    # Of the test, for the number of seeds that would decide an undecided comparison.
    power: float = number(0.8, at_least=0.5, below=1)


@dataclass
class ProofConfig:
    """The settings of a certificate."""

    # Updates that are compared one by one with the larger batch's; by default 100, or 36 for models with more
    # than 2 million parameters.
    updates: int | None = count(None)


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
    # Make a certificate before the run, and keep it with the run.
    prove: bool = False
    proof: ProofConfig = field(default_factory=ProofConfig)
    # The metric of the best checkpoint and of early stopping, and whether "max" or "min" is better.
    monitor: str = "eval/accuracy"
    mode: str = "max"
    seed: int = count(0, at_least=0, at_most=LARGEST)
    # Runs of the seeds seed, seed + 1, ..., trained together; each equals the run of its seed alone.
    replicas: int = count(1, at_most=4096)
    device: str = "auto"
    # Null: fp16 with a loss scale, fp32 without.
    precision: Precision | None = None
    # Dtype of the parameters. Null: fp64 with precision=fp64, fp32 otherwise.
    param_precision: Precision | None = None
    resume: str | None = None
    # Of a resumed run: packages whose classes its checkpoint may name, besides those that the project knows;
    # true for anything.
    trust: Any = False
