"""What the unseen loops share: the case, its book, small models and seeded batches."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Case:
    """A training loop as someone wrote it, and whether its window makes the larger batch's update."""

    name: str
    kind: str
    wrong: bool
    make: Callable[[], dict[str, Any]]
    cause: str = ""


class Book(list[Case]):
    """The cases of a module. The docstring of a wrong one is the cause."""

    def wrong(self, kind: str, **arguments):
        """The decorated function is a wrong loop."""
        return lambda loop: self.enter(loop, kind, True, lambda: given(loop, **arguments))

    def right(self, kind: str, **arguments):
        """The decorated function is a right loop."""
        return lambda loop: self.enter(loop, kind, False, lambda: given(loop, **arguments))

    def wrong_case(self, kind: str):
        """The decorated function makes the arguments, because its loop holds objects of its own."""
        return lambda make: self.enter(make, kind, True, make)

    def right_case(self, kind: str):
        return lambda make: self.enter(make, kind, False, make)

    def enter(self, function, kind, wrong, make):
        cause = " ".join(function.__doc__.split()) if wrong else ""
        self.append(Case(function.__name__, kind, wrong, make, cause))
        return function


def given(train_window, model=None, loss=F.cross_entropy, batch=None, steps=4, updates=20, **options):
    """The arguments of a case; models and batches are made by functions, so that each case has its own."""
    model, batch = (model or mlp)(), (batch or classes)()
    return dict(
        train_window=train_window,
        model=model,
        loss=loss,
        batch=batch,
        steps=steps,
        updates=updates,
        **options,
    )


class Counts:
    """How many windows each model has had."""

    def __init__(self):
        self.seen = WeakKeyDictionary()

    def __call__(self, model):
        """The number of this update, from 1 on."""
        self.seen[model] = self.seen.get(model, 0) + 1
        return self.seen[model]


def seeded(make, seed=0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def generator(seed):
    return torch.Generator().manual_seed(seed)


def two_layers(features, hidden, outputs) -> Any:
    layers = dict(body=nn.Linear(features, hidden), act=nn.Tanh(), head=nn.Linear(hidden, outputs))
    return nn.Sequential(OrderedDict(layers))


def mlp():
    return seeded(lambda: two_layers(6, 16, 3))


def regressor():
    return seeded(lambda: two_layers(5, 12, 1), 1)


def classes(n=24, features=6, labels=3, seed=3):
    g = generator(seed)
    return torch.randn(n, features, generator=g), torch.randint(0, labels, (n,), generator=g)


def values(n=20, features=5, seed=4):
    g = generator(seed)
    x = torch.randn(n, features, generator=g)
    return x, x.sum(1, keepdim=True).sin() + 0.3 * torch.randn(n, 1, generator=g)


def images(n=16, size=6, labels=3, seed=5):
    g = generator(seed)
    return torch.randn(n, 1, size, size, generator=g), torch.randint(0, labels, (n,), generator=g)


def sentences(n=16, length=7, words=11, seed=6) -> tuple[Any, Any]:
    """Token ids with labels that are -100 after each sentence's end."""
    g = generator(seed)
    ids = torch.randint(1, words, (n, length), generator=g)
    lengths = torch.randint(2, length + 1, (n, 1), generator=g)
    labels = torch.randint(1, words, (n, length), generator=g)
    return ids, labels.masked_fill(torch.arange(length) >= lengths, -100)


class Tagger(nn.Module):
    """A class for every token."""

    def __init__(self, words=11, width=8, sparse=False):
        super().__init__()
        self.embed = nn.Embedding(words, width, sparse=sparse)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, words)

    def forward(self, ids):
        return self.head(torch.tanh(self.mix(self.embed(ids))))


def tagger():
    return seeded(Tagger, 2)


def token_loss(logits, labels):
    """The mean over the tokens that are not padding."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


def token_total(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


class TokenMean:
    """The same mean by its denominator and its sum."""

    def weight(self, labels):
        return (labels != -100).sum()

    def total(self, logits, labels):
        return token_total(logits, labels)


def samples(value) -> int:
    """The number of samples in a tensor, or in a tuple or a dict of them."""
    if isinstance(value, torch.Tensor):
        return len(value) if value.dim() else 0
    if isinstance(value, dict):
        value = list(value.values())
    return max((samples(v) for v in value), default=0) if isinstance(value, (list, tuple)) else 0


def cut(value, start, stop) -> Any:
    """The samples from start to stop; what has no samples stays as it is."""
    if isinstance(value, torch.Tensor):
        return value[start:stop] if value.dim() else value
    if isinstance(value, dict):
        return {name: cut(v, start, stop) for name, v in value.items()}
    return tuple(cut(v, start, stop) for v in value) if isinstance(value, (list, tuple)) else value


def micro_batches(batch, steps) -> list[tuple[Any, Any]]:
    """At most ``steps`` micro-batches of equal size, the last may be smaller."""
    n = samples(batch[0])
    size = -(-n // steps)
    return [(cut(batch[0], i, i + size), cut(batch[1], i, i + size)) for i in range(0, n, size)]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def decaying(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01)


def grouped(parameters):
    """Decay for the weights alone."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.SGD(
        [
            {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.dim() <= 1], "lr": 0.02},
        ],
        lr=0.1,
        momentum=0.9,
    )
