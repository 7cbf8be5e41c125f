"""What the loops train: a model and its samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from accumexp.models import MLP, Bert, LeNet5, resnet18

SEED = 0
MODELS = ("lenet5", "resnet18", "bert", "mlp")
# Overrides of `accumexp.run`; the loop sets data.train.
OVERRIDES = {
    "lenet5": ["model=lenet5"],
    "resnet18": ["model=resnet18", "model.norm=group", "data.channels=3"],
    "bert": ["data=text", "model=bert"],
    "mlp": ["model=mlp"],
}
TEXT_LENGTH, TEXT_VOCABULARY, MASKED = 64, 258, 9


class Samples(TensorDataset):
    """`samples` samples for `model`; its distinct samples are repeated as often as necessary.

    lenet5, mlp: digits, (1, 32, 32). resnet18: the same in 3 channels. bert: bytes of Python's sources,
    input_ids and attention_mask (64,), of 57 to 63 bytes, 9 of which are masked in every sample: the mean of
    micro-batch means is then the window's mean, so that loops which compute the former can be compared.
    """

    def __init__(self, model: str, samples: int, dtype: torch.dtype = torch.float32) -> None:
        distinct = _distinct(model)
        chosen = torch.arange(samples) % len(distinct[0])
        super().__init__(*(t[chosen].to(dtype) if t.is_floating_point() else t[chosen] for t in distinct))


@cache
def _distinct(model: str) -> tuple[Tensor, ...]:
    if model == "bert":
        from accumexp.data import PythonSources

        text = PythonSources("train", samples=4000, length=TEXT_LENGTH, min_length=57)
        assert isinstance(text.inputs, dict) and isinstance(text.targets, Tensor)
        chosen = (text.targets != -100).sum(1) == MASKED
        return tuple(
            t[chosen] for t in (text.inputs["input_ids"], text.inputs["attention_mask"], text.targets)
        )
    from accumexp.data import Digits

    images, labels = Digits(train=True).tensors
    return images.expand(-1, 3 if model == "resnet18" else 1, -1, -1).contiguous(), labels


def distinct_samples(model: str) -> int:
    """The number of distinct samples for `model`."""
    return len(_distinct(model)[0])


@dataclass(frozen=True)
class Task:
    """The work of every loop: epochs of updates of `steps` micro-batches.

    Attributes:
        samples: in an epoch, a whole number of updates.
        width: of the mlp's two hidden layers.
        dtype: of parameters and images; float64 where gradients are compared.
    """

    model: str
    device: torch.device
    micro_batch: int
    steps: int
    samples: int
    deterministic: bool = False
    width: int = 128
    dtype: torch.dtype = torch.float32

    @property
    def batch(self) -> int:
        return self.micro_batch * self.steps

    @property
    def updates(self) -> int:
        """Updates in an epoch."""
        return self.samples // self.batch

    def dataset(self) -> Samples:
        return Samples(self.model, self.samples, self.dtype)

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset(), batch_size=self.micro_batch, shuffle=True)

    def build(self) -> nn.Module:
        """The model of that name in `conf/`, without BatchNorm."""
        if self.model == "lenet5":
            made: nn.Module = LeNet5()
        elif self.model == "resnet18":
            made = resnet18(10, norm="group")
        elif self.model == "bert":
            made = Bert(TEXT_VOCABULARY, TEXT_LENGTH)
        else:
            made = MLP(32 * 32, 10, (self.width, self.width))
        return made.to(self.device, self.dtype)

    def overrides(self) -> list[str]:
        widths = [f"model.hidden=[{self.width},{self.width}]"] if self.model == "mlp" else []
        precision = ["precision=fp64"] if self.dtype is torch.float64 else []
        return OVERRIDES[self.model] + widths + precision
