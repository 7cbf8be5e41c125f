"""Settings of an audit: what every trainer trains, with the parts that their users would write themselves."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from logging import NOTSET, WARNING, disable
from typing import Protocol, TypeVar
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

LEARNING_RATE = 0.1
WARM_UP_UPDATES = 4
# Settings that do not need a trainer's own models.
GENERAL = (
    *("classes", "tokens", "epoch", "short_epoch", "label_smoothing", "own_loss", "groups", "clipping"),
    *("schedule", "two_ranks", "bf16", "dropout"),
)
IGNORED = -100  # a label that counts for nothing, as in torch.nn.functional.cross_entropy

Module = TypeVar("Module", bound=nn.Module)


class Watch(Protocol):
    """What `accumexp.proof.audit` gives to a fit."""

    dtype: torch.dtype

    def __call__(self, model: Module, /) -> Module:
        """Makes `model` observable and returns it."""
        ...

    def loss(self, value: float, /) -> None:
        """Takes the loss that the trainer logs for its newest update."""
        ...


@dataclass(frozen=True)
class Setting:
    """What is trained, on which data and how.

    Attributes:
        name: of the setting, as in `accumexp/conf/audit/`.
        model: "mlp", or a model of transformers, see `accumexp.audit.models`.
        task: "classes" (a label a sample) or "tokens" (sequences of several lengths, a label a token, some of
            which are ignored).
        label_smoothing: of the cross entropy.
        own_loss: train with a loss of the user's own, `focal_loss`.
        groups: two parameter groups with different learning rates.
        clip_norm: largest norm of an update's gradient.
        schedule: a linear warm-up over the first `WARM_UP_UPDATES` updates, then a constant learning rate.
        samples: in an epoch.
        epochs: how often the samples are trained on.
        processes: ranks, each with its share of the samples.
        precision: "fp64", or "bf16" for the trainer's mixed precision.
        dropout: probability of dropout.
        seed: of the data and the initial weights.
    """

    name: str = "classes"
    model: str = "mlp"
    task: str = "classes"
    label_smoothing: float = 0.0
    own_loss: bool = False
    groups: bool = False
    clip_norm: float | None = None
    schedule: bool = False
    samples: int = 96
    epochs: int = 2
    processes: int = 1
    precision: str = "fp64"
    dropout: float = 0.0
    seed: int = 0

    @property
    def mixed(self) -> bool:
        """Whether the trainer computes in bf16."""
        return self.precision == "bf16"

    def dtype(self, watch: Watch) -> torch.dtype:
        """Of the weights: what `watch` asks for, fp32 for mixed precision."""
        return torch.float32 if self.mixed else watch.dtype


def general_but(*names: str) -> tuple[str, ...]:
    """The general settings without those of `names`."""
    return tuple(name for name in GENERAL if name not in names)


def cross_entropy(setting: Setting) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean loss over labels that are not ignored, of outputs (..., classes) and labels (...)."""
    if setting.own_loss:
        return focal_loss
    criterion = nn.CrossEntropyLoss(ignore_index=IGNORED, label_smoothing=setting.label_smoothing)
    return lambda outputs, labels: criterion(outputs.flatten(0, -2), labels.flatten())


def focal_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """The focal loss (1 - p)^2 * -log p of each label, 0 where it is ignored; shape (labels,)."""
    losses = nn.functional.cross_entropy(
        outputs.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return (1 - torch.exp(-losses)) ** 2 * losses


def focal_loss(outputs: Tensor, labels: Tensor) -> Tensor:
    """The mean focal loss over labels that are not ignored."""
    return focal_losses(outputs, labels).sum() / (labels != IGNORED).sum()


def optimizer_of(setting: Setting, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum; with `groups`, biases learn at a tenth of the rate."""
    if not setting.groups:
        return torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
    named = list(model.named_parameters())
    weights = [parameter for name, parameter in named if not name.endswith("bias")]
    biases = [parameter for name, parameter in named if name.endswith("bias")]
    return torch.optim.SGD(
        [{"params": weights}, {"params": biases, "lr": LEARNING_RATE / 10}], LEARNING_RATE, momentum=0.9
    )


def schedule_of(setting: Setting, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Linear warm-up, or a constant learning rate; to be stepped once an update."""
    updates = WARM_UP_UPDATES if setting.schedule else 1
    return LambdaLR(optimizer, lambda update: min(1.0, (update + 1) / updates))


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps a trainer's prints, warnings and log messages below errors from the audit's output.

    What is in memory is left out of garbage collections, which some trainers start after every training.
    """
    gc.freeze()
    with catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        simplefilter("ignore")
        disable(WARNING)
        try:
            yield
        finally:
            disable(NOTSET)
            gc.unfreeze()


@contextmanager
def new_accelerate() -> Iterator[None]:
    """Resets, before and after, the settings that Accelerate keeps of the first Accelerator of a process.

    A user's process has one Accelerator; another one would have the precision of the first.
    """
    from accelerate.state import AcceleratorState, GradientState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    try:
        yield
    finally:
        reset()
