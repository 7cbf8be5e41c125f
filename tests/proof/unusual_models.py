"""Models that are right in unusual ways, and small batches for them."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, normalize
from torch.utils.checkpoint import checkpoint

SAMPLES, CLASSES = 16, 5


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def numbers(count: int = SAMPLES, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=generator())


def labels(count: int = SAMPLES) -> Tensor:
    return torch.randint(0, CLASSES, (count,), generator=generator())


def tokens(count: int = SAMPLES, length: int = 3) -> Tensor:
    return torch.randint(0, 11, (count, length), generator=generator())


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, CLASSES))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, functional: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 9)
        self.block = nn.Sequential(
            nn.Linear(9, 9), nn.ReLU(), nn.Identity() if functional else nn.Dropout(0.3)
        )
        self.head = nn.Linear(9, CLASSES)
        self.reentrant, self.functional = reentrant, functional

    def inner(self, x: Tensor) -> Tensor:
        return dropout(self.block(x), 0.2) if self.functional else self.block(x)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.inner, self.embed(x), use_reentrant=self.reentrant)
        return self.head(hidden)


class Forces(nn.Module):
    """Energies, and forces as their negative gradients by the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 1))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions.requires_grad_()
        energies = self.net(positions).squeeze(1)
        return energies, -torch.autograd.grad(energies.sum(), positions, create_graph=True)[0]


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, sparse=True)
        self.head = nn.Linear(6, CLASSES).requires_grad_(False)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words).mean(1).tanh())


class InPlace(nn.Module):
    """Normalises its input in place, and each layer its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True), nn.Linear(9, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5).div_(2.0)
        return self.net(x)


class Counted(nn.Module):
    """Takes much beside its samples, and returns its loss, divided by a count of the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(
        self, x: Tensor, y: Tensor, count: Tensor, scale: float, mode: str, cache: Any, mask: Any = None
    ) -> Any:
        assert mode == "train" and cache.keys == [] and mask is None
        cache.keys.append(x)
        logits = self.net(x) * scale
        return Output(loss=cross_entropy(logits, y, reduction="sum") / count, logits=logits)


class Cache:
    def __init__(self) -> None:
        self.keys: list[Tensor] = []


@dataclass
class Output:
    loss: Tensor
    logits: Tensor
    extra: Any = None
    time: float = 0.5


Named = namedtuple("Named", "logits extra")


class Returning(nn.Module):
    """Returns its scores in a container of the `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind = classifier(), kind

    def forward(self, x: Tensor) -> Any:
        out = self.net(x)
        if self.kind == "dict":
            return {"logits": out, "time": 0.5, "none": None}
        if self.kind == "ordered":
            return OrderedDict(logits=out, name="x")
        if self.kind == "object":
            holder = Cache()
            holder.keys = [out]
            return holder
        if self.kind == "named":
            return Named(out, None)
        return (None, out, 3) if self.kind == "tuple" else Output(out.sum(), out)


class WithLabels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> dict[str, Any]:
        hidden = self.embedding(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        logits = self.head(self.drop(hidden.sum(1)))
        return {"loss": None if labels is None else cross_entropy(logits, labels), "logits": logits}


class Stored(nn.Module):
    """Keeps what it computed, as models with auxiliary losses do, and a constant that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()
        self.hidden: Any = None
        self.constant = torch.randn(6, 6, generator=generator())

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.net[0](x @ self.constant)
        return self.net[2](self.net[1](self.hidden))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, CLASSES, dtype=torch.complex64, generator=generator()) / 3)
        self.scale = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight).abs() * self.scale


class Images(nn.Module):
    """Takes bytes and a mask of bools."""

    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        return self.net(images.float() / 255 * mask)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).view(-1, 1, CLASSES)[:, 0]


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x).float()


class Twice(nn.Module):
    """Encodes two views of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.3), nn.Linear(9, CLASSES))

    def forward(self, one: Tensor, other: Any, third: Any = None) -> Tensor:
        return self.encoder(one) - self.encoder(other).tanh()


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(6, 9).requires_grad_(False)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x).tanh()
        return self.head(self.drop(features))


def hooked() -> nn.Module:
    """Its user's hook changes what it receives."""
    model = classifier()
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2 - 1,))
    return model


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = classifier()

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.net(inputs["features"])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(3, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda x: self.cell(x)[0][:, -1], x, use_reentrant=False))


class Normalised(nn.Module):
    """A weight norm of either kind."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.utils.parametrizations.weight_norm(nn.Linear(6, 9))
        self.head = nn.Linear(9, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(normalize(self.one(x), dim=1))
