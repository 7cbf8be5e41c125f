"""Small models of many kinds, without statistics over the batch: a window of each is the larger batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLASSES = 4
LENGTH = 5
WORDS = 11


@dataclass(frozen=True)
class Kind:
    """A model and the shape of one of its inputs."""

    shape: tuple[int, ...]
    make: Callable[[], nn.Module]


def mlp(activation: Callable[[], nn.Module], width: int = 7) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Linear(6, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, CLASSES)
    )


def convolutions(norm: Callable[[int], nn.Module] = lambda _: nn.Identity()) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), norm(3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def dead_units() -> nn.Module:
    """No sample passes the first layer, so most gradients are zero."""
    model = mlp(nn.ReLU)()
    nn.init.constant_(model.get_submodule("0").bias, -1e4)  # type: ignore[arg-type]
    return model


def frozen() -> nn.Module:
    model = mlp(nn.Tanh)()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(("0.", "4.bias")))
    return model


class Unused(nn.Module):
    """Has parameters that no output depends on, and one of a single element."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, CLASSES)
        self.unused = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) * self.scale


class Tied(nn.Module):
    """One matrix goes in and out, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, CLASSES)
        self.head = nn.Linear(CLASSES, WORDS, bias=False)
        self.head.weight = self.embedding.weight
        self.out = nn.Linear(WORDS, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.head(self.embedding(tokens).tanh())).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout, "gelu", batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens))).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class ByHand(nn.Module):
    """Makes its state in fp32 and normalises in it, as models for bf16 do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.weight = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x).float()
        hidden = hidden * torch.rsqrt(hidden.square().mean(1, keepdim=True) + 1e-6)
        hidden = hidden + torch.zeros(len(x), 6, dtype=torch.float32, device=x.device)
        return self.head((hidden * self.weight).to(self.head.weight.dtype))


MODELS = {
    "mlp relu": Kind((6,), mlp(nn.ReLU)),
    "mlp gelu": Kind((6,), mlp(nn.GELU)),
    "mlp tanh": Kind((6,), mlp(nn.Tanh)),
    "one unit": Kind((6,), mlp(nn.ReLU, 1)),
    "convolutions": Kind((1, 8, 8), convolutions),
    "group norm": Kind((1, 8, 8), lambda: convolutions(lambda channels: nn.GroupNorm(1, channels))),
    "layer norm": Kind((6,), lambda: nn.Sequential(
        nn.Linear(6, 7), nn.LayerNorm(7), nn.SiLU(), nn.Linear(7, CLASSES))),
    "dead units": Kind((6,), dead_units),
    "frozen": Kind((6,), frozen),
    "unused": Kind((6,), Unused),
    "dropout": Kind((6,), lambda: nn.Sequential(
        nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.4), nn.Linear(9, CLASSES), nn.Dropout(0.1))),
    "recurrent": Kind((4, 3), Recurrent),
    "by hand": Kind((6,), ByHand),
}  # fmt: skip
TOKEN_MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "attention": Attention,
    "attention with dropout": lambda: Attention(0.2),
}
DRAWS = ("dropout", "attention with dropout")
